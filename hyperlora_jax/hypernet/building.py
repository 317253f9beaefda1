"""From a config's `model` section to a generator.

generator   regression | iterative | diffusion | latent_diffusion
            | mean | nearest | knn | ridge | pca_gaussian
network     keyword arguments of TokenHypernetwork, and `components_per_token`
condition_dropout, num_iterations
diffusion   prediction (x0 | v | flow), num_train_timesteps, denoiser (tokens | mlp)
mlp         keyword arguments of MlpDenoiser
vae         keyword arguments of WeightVae
baseline    keyword arguments of `baselines.make_baseline`
"""

from typing import Any

from ml_collections import ConfigDict

from hyperlora_jax.array_types import Json
from hyperlora_jax.diffusion.processes import make_process
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import BASELINES, make_baseline
from hyperlora_jax.hypernet.generators import Generator, Iterative, Regression
from hyperlora_jax.hypernet.mlp_denoiser import MlpDenoiser
from hyperlora_jax.hypernet.token_layout import make_layout
from hyperlora_jax.hypernet.token_network import TokenHypernetwork
from hyperlora_jax.hypernet.weight_diffusion import (
    Diffusion,
    Latents,
    TokenDenoiser,
    WeightVae,
    Whitened,
)
from hyperlora_jax.lora.sites import LoraSpec

TRAINED = ("regression", "iterative", "diffusion", "latent_diffusion")
GENERATORS = (*TRAINED, *BASELINES)
DENOISERS = ("tokens", "mlp")
SECTIONS = (
    "generator", "network", "condition_dropout", "num_iterations", "diffusion", "mlp", "vae",
    "baseline",
)  # fmt: skip


def architecture(model: Json | ConfigDict) -> Json:
    """The part of a config's `model` section (a mapping) that says what the generator is:
    JSON-able, kept with checkpoints."""
    plain = model.to_dict() if isinstance(model, ConfigDict) else dict(model)
    return {name: plain[name] for name in SECTIONS if name in plain}


def with_remat(model: Json, remat: str) -> Json:
    """The same architecture; its backbone recomputes every block unless `remat` is "none"."""
    if remat == "none":
        return dict(model)
    return {**model, "network": {**model.get("network", {}), "remat": True}}


def build_generator(spec: LoraSpec, model: Json) -> Generator:
    """The generator that `architecture` describes.

    Raises:
        UserError: an unknown generator, or a value that its part refuses.
    """
    unknown = sorted(set(model) - set(SECTIONS))
    if unknown:
        raise UserError(f"config.model: unknown key {unknown[0]!r}, expected {', '.join(SECTIONS)}")
    kind = model.get("generator", "regression")
    if kind not in GENERATORS:
        raise UserError(
            f"config.model.generator: got {kind!r}, expected one of {', '.join(GENERATORS)}"
        )
    try:
        return _build(kind, spec, model)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error


def _build(kind: str, spec: LoraSpec, model: Json) -> Generator:
    if kind in BASELINES:
        return make_baseline(kind, spec, **model.get("baseline", {}))
    network = dict(model.get("network", {}))
    dropout = float(model.get("condition_dropout", 0.0))
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"condition_dropout is {dropout}, expected 0 or more and less than 1")
    if kind == "regression":
        return Regression(build_network(spec, network), dropout)
    if kind == "iterative":
        net = build_network(spec, {**network, "input_noise": True})
        return Iterative(net, dropout, int(model.get("num_iterations", 4)))
    settings = dict(model.get("diffusion", {}))
    denoiser = settings.pop("denoiser", "tokens")
    process = make_process(settings.pop("prediction", "x0"), **settings)
    if kind == "latent_diffusion":
        codec: Any = Latents(spec, WeightVae(spec.num_parameters, **model.get("vae", {})))
        denoiser = "mlp"  # latents have no tokens
    else:
        codec = Whitened(spec)
    if denoiser not in DENOISERS:
        raise ValueError(f"diffusion.denoiser is {denoiser!r}, expected one of {DENOISERS}")
    if denoiser == "mlp":
        module: Any = MlpDenoiser(codec.size, **model.get("mlp", {}))
    else:
        whitened = {**network, "input_noise": True, "output": "whitened"}
        module = TokenDenoiser(build_network(spec, whitened))
    return Diffusion(codec, module, process, dropout)


def build_network(spec: LoraSpec, network: Json) -> TokenHypernetwork:
    """The token network of keyword arguments of TokenHypernetwork, and `components_per_token`.

    Raises:
        UserError: an unknown argument, or tokens that do not divide the rank.
    """
    kwargs = dict(network)
    try:
        layout = make_layout(spec, kwargs.pop("components_per_token", None))
        return TokenHypernetwork(layout=layout, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model.network: {error}") from error
