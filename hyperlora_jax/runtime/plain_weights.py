"""Weights of Linen modules in PyTorch's layout, under the names that `generate_lora.py` reads.

What only looks different becomes one thing here, so that the file stays short: heads are linear
maps of a group's tokens or of each token, closed forms are a mean and directions, scales are part
of the weights, and which number of the LoRA a token writes is a table of places.
"""

import re
from collections.abc import Callable

import numpy as np
from flax.traverse_util import flatten_dict

from hyperlora_jax.array_types import Float, Int, JsonDict, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import Fitted, Mean, Neighbours, PcaGaussian, Ridge
from hyperlora_jax.hypernet.mlp_denoiser import MlpDenoiser
from hyperlora_jax.hypernet.token_layout import (
    TokenGroup,
    TokenLayout,
    frozen_basis,
    token_features,
)
from hyperlora_jax.hypernet.token_network import TokenHypernetwork
from hyperlora_jax.hypernet.weight_diffusion import WeightVae

Tensors = dict[str, np.ndarray]
Described = tuple[JsonDict, Tensors]  # a part of config.json, and its tensors
Replacement = str | Callable[[re.Match[str]], str]


def plain(params: Params) -> Tensors:
    """Kernels of Dense, DenseGeneral and Conv as "weight", outputs first; scales of norms too."""
    tensors = {}
    for name, leaf in flatten_dict(dict(params), sep="/").items():
        (parent, _, last), value = name.rpartition("/"), np.asarray(leaf, np.float32)
        if last == "kernel" and value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif last == "kernel":
            outputs = value.shape[-1] if parent.endswith("out") or value.ndim == 2 else -1
            inputs = -1 if outputs > 0 else value.shape[0]
            value = value.reshape(inputs, outputs).T
        last = "weight" if last in ("kernel", "scale") else last
        tensors[f"{parent}/{last}" if parent else last] = (
            value.reshape(-1) if last == "bias" else value
        )
    return tensors


def renamed(tensors: Tensors, rules: tuple[tuple[str, Replacement], ...]) -> Tensors:
    """Every rule (regular expression, replacement) is applied to every name, in order."""
    result = {}
    for name, value in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def token_network(net: TokenHypernetwork, params: Params) -> Described:
    """The transformer over LoRA tokens."""
    layout, own = net.layout, dict(params)
    blocks, features = own.pop("backbone"), token_features(layout)
    names = [f"{group.side}_{group.width}" for group in layout.groups]
    heads = [own.pop(f"head_{name}", None) for name in names]
    places = token_places(layout)
    order = np.argsort(places)
    centre = [np.asarray(own.pop(f"centre_{name}")).reshape(-1) for name in names]
    embeddings = [np.asarray(own.pop(f"embed_{name}"))[ids] for name, ids in features.items()]
    tensors = {
        "centre": np.concatenate(centre)[order],
        "order": order.astype(np.int32),
        "embeddings": np.sum(embeddings, axis=0),
        **plain(own),
    }
    for number, (name, group) in enumerate(zip(names, layout.groups, strict=True)):
        size = net.unit_size(group)
        weight, bias = _head(net, group, heads[number])
        tensors |= {f"head_{number}/weight": size * weight, f"head_{number}/bias": size * bias}
        if net.input_noise:
            tensors[f"noise_{number}/weight"] = tensors.pop(f"noise_{name}/weight") / size
            tensors[f"noise_{number}/bias"] = tensors.pop(f"noise_{name}/bias")
    if net.input_noise:
        written = np.float32([head is not None for head in heads])
        tensors["gates/weight"] = tensors["gates/weight"] * written[:, None]
        tensors["gates/bias"] = tensors["gates/bias"] * written
        tensors |= {"places": places.astype(np.int32), "frequencies": _frequencies(net.width)}
    for number in range(net.depth):
        own = _layer(blocks["blocks"], number) if net.scan else blocks[f"block_{number}"]
        part = renamed(plain(own), (("^mlp_", "mlp/"), ("^adalora", "early_adapter")))
        tensors |= {f"block_{number}/{name}": value for name, value in part.items()}
    counts = [len(group.sites) for group in layout.groups]
    config = {
        "kind": "tokens",
        "depth": net.depth,
        "num_heads": net.num_heads,
        "activation": ("gelu", {"approximate": "tanh"}, 1.0),
        "counts": counts,
        "sizes": [
            n * layout.components * g.width for n, g in zip(counts, layout.groups, strict=True)
        ],
    }
    return config, tensors


def _layer(stacked: Params, number: int) -> Params:
    return {
        name: _layer(leaf, number) if isinstance(leaf, dict) else np.asarray(leaf)[number]
        for name, leaf in stacked.items()
    }


def _head(
    net: TokenHypernetwork, group: TokenGroup, params: Params | None
) -> tuple[np.ndarray, np.ndarray]:
    """(weight [size, c], bias [size]), or one for each token: [n, size, c], [n or 1, size]."""
    components = net.layout.components
    size = components * group.width
    if params is None:  # nothing is added to the centre
        return np.zeros((size, net.width), np.float32), np.zeros(size, np.float32)
    own = {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(params), sep="/").items()}
    if net.head == "dense":
        return own["dense/kernel"].T, own["dense/bias"]
    if net.head == "per_token":
        return own["kernel"].swapaxes(1, 2), np.zeros((1, size), np.float32)
    kernel, bias = own["mix/kernel"], own["mix/bias"]
    if net.head == "basis":
        return np.einsum("ck,nkw->nwc", kernel, own["basis"]), np.einsum(
            "k,nkw->nw", bias, own["basis"]
        )
    count = min(net.basis_size, group.width)
    basis = frozen_basis(count, group.width)
    weight = kernel.reshape(-1, components, count) @ basis
    return weight.reshape(-1, size).T, (bias.reshape(components, count) @ basis).reshape(-1)


def token_places(layout: TokenLayout) -> Int[np.ndarray, " d"]:
    """Which number of the flat vector every number is that tokens write, in their order."""
    rows, start = {}, 0
    for index, site in enumerate(layout.spec.sites):
        middle, stop = start + site.rank * site.fan_in, start + site.num_parameters
        down = np.arange(start, middle).reshape(site.rank, site.in_features, -1)
        rows[index, "down"] = down.swapaxes(1, 2).reshape(site.rank, -1)
        rows[index, "up"] = np.arange(middle, stop).reshape(site.out_features, site.rank).T
        start = stop
    return np.concatenate(
        [
            rows[site, group.side][first : first + layout.components].reshape(-1)
            for group in layout.groups
            for site, first in zip(group.sites, group.first_components, strict=True)
        ]
    )


def mlp_network(net: MlpDenoiser, params: Params) -> Described:
    """The paper's denoiser."""
    tensors = renamed(
        plain(params),
        ((r"^((?:en|de)code_\d+_\d+)/(in|out)/", r"\1/mlp/\2/"), ("/adalora/", "/late_adapter/")),
    )
    for name in [name for name in tensors if "/modulation/" in name]:
        half = len(tensors[name]) // 2  # shift, scale; a gate of 1
        gate = np.ones if name.endswith("bias") else np.zeros
        tensors[name] = np.concatenate(
            [tensors[name], gate((half, *tensors[name].shape[1:]), np.float32)]
        )
    layers = ["norm_in", "in"]
    for stage in range(net.num_stages):
        blocks = [f"encode_{stage}_{k}" for k in range(net.blocks_per_stage)]
        layers += [*([f"down_{stage}"] if stage else []), *blocks, "keep"]
    for stage in reversed(range(net.num_stages)):
        layers += [f"up_{stage}", *(f"decode_{stage}_{k}" for k in range(net.blocks_per_stage))]
    config = {
        "kind": "mlp",
        "layers": [*layers, "norm_out", "out"],
        "adapters": net.conditioning == "adalora",
        "activation": ("silu", {}, 1.0),
    }
    return config, {**tensors, "frequencies": _frequencies(net.width)}


def vae_decoder(vae: WeightVae, constants: Params) -> Described:
    """The decoder of the paper's VAE; latents of unit variance enter it."""
    tensors = renamed(
        plain({name: constants["vae"][name] for name in ("open", "decoder", "leave")}),
        (
            (r"^decoder/norm_(\d+)", r"block_\1/norm_mlp"),
            (r"^decoder/(in|out)_(\d+)", r"block_\2/mlp/\1"),
        ),
    )
    weight = tensors["open/weight"]
    tensors["open/bias"] = tensors["open/bias"] + weight @ np.asarray(constants["latent_mean"])
    tensors["open/weight"] = weight * np.asarray(constants["latent_std"])
    layers = ["open", *(f"block_{k}" for k in range(vae.depth)), "leave"]
    return {"layers": layers, "activation": ("silu", {}, 1.0)}, tensors


def closed_form(fitted: Fitted, constants: Params, embedding_dim: int) -> Described:
    """mean + guidance · shares · directions; the shares are of neighbours, of a kernel or drawn.

    Raises:
        UserError: LoRAs are blended as deltas, which takes a decomposition of each.
    """
    own = {k: np.asarray(v, np.float64) for k, v in constants.items() if k != "familiarity"}
    if isinstance(fitted, Mean):  # a kernel on nothing
        return {"temperature": 1.0}, {
            "embeddings": np.zeros((1, embedding_dim), np.float32),
            "lora/mean": own["mean"].astype(np.float32),
            "lora/directions": np.zeros((1, len(own["mean"])), np.float32),
        }
    if isinstance(fitted, PcaGaussian):
        directions = own["spread"][:, None] * own["components"]
        return {}, _float32({"lora/mean": own["mean"], "lora/directions": directions})
    if not isinstance(fitted, Neighbours | Ridge):
        raise ValueError(f"unknown closed form {type(fitted).__name__}")
    if fitted.space != "raw":
        raise UserError(
            f"model.baseline.space is {fitted.space!r}: its LoRAs are decomposed one by one, which "
            "only JAX does here; expected 'raw'"
        )
    mean = own["vectors"].mean(axis=0)
    directions = own["vectors"] - mean
    if isinstance(fitted, Ridge):
        config: JsonDict = {"temperature": fitted.kernel_width}
        directions = own["inverse"] @ directions
    else:
        config = {"temperature": fitted.temperature, "num_neighbours": fitted.num_neighbours}
    return config, _float32(
        {"embeddings": own["embeddings"], "lora/mean": mean, "lora/directions": directions}
    )


def _float32(tensors: Tensors) -> Tensors:
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def _frequencies(width: int) -> Float[np.ndarray, " c"]:
    """What `timestep_features` multiplies a time by, to the last bit."""
    import jax.numpy as jnp

    return np.asarray(jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), width // 2)))
