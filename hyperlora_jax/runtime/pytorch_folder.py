"""A hypernetwork as a folder for PyTorch: model.safetensors, config.json, and as generate.py the
one file that runs them, `generate_lora.py`. Nothing of this package or of JAX is needed there.
"""

import json
from pathlib import Path

import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import JsonDict
from hyperlora_jax.encoders.clip_encoder import ClipImageEncoder
from hyperlora_jax.encoders.condition_encoders import FlaxImageEncoder, ImageEncoder
from hyperlora_jax.encoders.foreign_encoders import ForeignImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.baselines import Fitted
from hyperlora_jax.hypernet.generators import Direct, Iterative
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.hypernet.mlp_denoiser import MlpDenoiser
from hyperlora_jax.hypernet.weight_diffusion import Diffusion, Latents, TokenDenoiser
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora_files import header, peft_directory, safetensors_io, writing
from hyperlora_jax.runtime import exporters, plain_weights, sampling_tables
from hyperlora_jax.runtime.plain_weights import Described, Tensors
from hyperlora_jax.stable_diffusion.weights.flax_trees import flax_to_torch

FORMAT = "hyperlora-pytorch-1"
TRANSFORMERS = {"input": "pixels", "outputs": ["pooled", "tokens"]}  # exported to ONNX
PROGRAM = Path(__file__).with_name("generate_lora.py")
_CLIP_NAMES = (
    (r"\.", "/"),
    ("^vision_model/", ""),
    ("^embeddings/class_embedding", "first"),
    ("^embeddings/patch_embedding", "patches"),
    ("^embeddings/position_embedding/weight", "positions"),
    ("^pre_layrnorm", "norm_in"),
    ("^post_layernorm", "norm_out"),
    ("^visual_projection", "projection"),
    ("^encoder/layers/", "block_"),
    ("/self_attn/", "/self_attention/"),
    ("/(q|k|v|out)_proj/", lambda found: f"/{_PROJECTIONS[found[1]]}/"),
    ("/layer_norm1/", "/norm_self_attention/"),
    ("/layer_norm2/", "/norm_mlp/"),
    ("/mlp/fc1/", "/mlp/in/"),
    ("/mlp/fc2/", "/mlp/out/"),
)
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "out": "out"}
# A function of PyTorch f, its options, and s of f(s · x) / s.
_ACTIVATIONS = {
    "quick_gelu": ("silu", {}, 1.702),
    "gelu_new": ("gelu", {"approximate": "tanh"}, 1.0),
}


def write_pytorch(hyper: Hypernetwork, out: epath.PathLike) -> None:
    """Writes the folder; every file appears whole or not at all.

    Raises:
        UserError: an encoder or a generator that only JAX or transformers runs; a folder that
            cannot be written.
    """
    config, tensors = described(hyper)
    with storage.writing(out, storage.scratch(out)) as folder:
        safetensors_io.write(folder / "model.safetensors", tensors, {})
        if isinstance(hyper.encoder, ForeignImageEncoder):
            safetensors_io.atomic_write(folder / "encoder.onnx", _onnx_file(hyper.encoder))
        safetensors_io.atomic_write(folder / "generate.py", PROGRAM.read_bytes())
        text = json.dumps(config, indent=1) + "\n"
        safetensors_io.atomic_write(folder / "config.json", text.encode())


def described(hyper: Hypernetwork) -> Described:
    """What the program reads: config.json and tensors."""
    config, tensors = _generator(hyper)
    config["encoder"], own = _encoder(hyper.encoder)
    tensors |= own
    if (familiarity := hyper.constants.get("familiarity")) is not None:
        tensors |= {f"familiarity/{k}": np.asarray(v, np.float32) for k, v in familiarity.items()}
    draw = hyper.default_draw
    return {"format": FORMAT, **config, "draw": draw._asdict(), **_lora(hyper)}, tensors


def _generator(hyper: Hypernetwork) -> Described:
    generator = hyper.generator
    if isinstance(generator, Fitted):
        form, tensors = plain_weights.closed_form(
            generator, hyper.constants, hyper.encoder.embedding_dim
        )
        size = len(tensors["lora/directions"]) if generator.stochastic else 0
        return {"generator": "closed", "noise_size": size, **form}, tensors
    config: JsonDict = {"guided": generator.condition_dropout > 0}
    if isinstance(generator, Direct):
        network, own = plain_weights.token_network(generator.net, hyper.params)
        count = generator.num_iterations if isinstance(generator, Iterative) else 1
        config |= {"generator": "iterative", "times": [k / count for k in range(count)]}
        return {**config, "noise_size": 0, "network": network}, _below("network", own)
    if not isinstance(generator, Diffusion):
        raise UserError(f"generator {type(generator).__name__}: cannot leave JAX")
    denoiser, constants = generator.denoiser, hyper.constants
    if isinstance(denoiser, TokenDenoiser):
        network, own = plain_weights.token_network(denoiser.net, hyper.params["net"])
    else:
        assert isinstance(denoiser, MlpDenoiser)
        network, own = plain_weights.mlp_network(denoiser, hyper.params)
    steps = hyper.default_draw.num_steps
    spread = vectorize.element_spread(constants["std"], hyper.spec)
    tensors = {
        **_below("network", own),
        **_below("steps", sampling_tables.tables(generator.process, steps)),
        "lora/mean": np.asarray(constants["mean"], np.float32),
        "lora/spread": np.asarray(spread, np.float32),
    }
    config |= {
        "generator": "diffusion",
        "noise_size": generator.codec.size,
        "max_steps": sampling_tables.most_steps(generator.process, steps),
        "network": network,
    }
    if isinstance(generator.codec, Latents):
        config["vae"], own = plain_weights.vae_decoder(generator.codec.vae, constants)
        tensors |= _below("vae", own)
    return config, tensors


def _encoder(encoder: ImageEncoder) -> Described:
    """Of ours and of CLIP the weights, in their own dtype; all others are an ONNX file."""
    config: JsonDict = {"name": encoder.name, "image_size": list(encoder.image_size)}
    if isinstance(encoder, FlaxImageEncoder):
        module, own = encoder.module, plain_weights.plain(encoder.params)
        config |= {"kind": "hyperlora", "groups": module.groups, "blocks": module.blocks}
        config["num_stages"] = len(module.widths)
        mean = std = (0.5,) * 3
    elif isinstance(encoder, ClipImageEncoder):
        values, names = encoder.module.values, ("layer_norm_eps", "patch_size")
        own = plain_weights.renamed(dict(flax_to_torch(encoder.params)), _CLIP_NAMES)
        config |= {"kind": "clip", **{name: values[name] for name in names}}
        config |= {"depth": values["num_hidden_layers"], "num_heads": values["num_attention_heads"]}
        config["activation"] = _ACTIVATIONS.get(
            values["hidden_act"], (values["hidden_act"], {}, 1.0)
        )
        mean, std = encoder.preprocessing.mean, encoder.preprocessing.std
    elif isinstance(encoder, ForeignImageEncoder):
        config |= {"kind": "onnx", "channels_first": encoder.channels_first}
        config |= TRANSFORMERS if encoder.module is not None else _of_onnx(encoder)
        own, mean, std = {}, encoder.preprocessing.mean, encoder.preprocessing.std
    else:
        raise UserError(
            f"encoder {encoder.name}: is a {type(encoder).__name__}, expected one of ours, CLIP, "
            "a model of transformers or an .onnx file"
        )
    dtype = writing.DTYPES[getattr(encoder, "dtype", "float32")]
    tensors = {name: np.asarray(value).astype(dtype) for name, value in own.items()}
    statistics = {"mean": np.float32(mean), "std": np.float32(std)}
    return config, {**_below("encoder", tensors), **statistics}


def _onnx_file(encoder: ForeignImageEncoder) -> bytes:
    """The file that there is, or of a model of transformers what PyTorch makes of it."""
    if encoder.module is None:
        return epath.Path(encoder.source).read_bytes()
    what = f"encoder {encoder.name}"
    with exporters.exporting(what, "torch", "onnxscript", "onnxruntime"):
        import torch

        names = [TRANSFORMERS["input"]], TRANSFORMERS["outputs"]
        free, shape = {"pixels": {0: torch.export.Dim("pictures")}}, (3, *encoder.image_size)
        with torch.no_grad():
            inputs = {"pixels": torch.zeros(2, *shape)}
            model = exporters.onnx_model(encoder.module, inputs, free, names).SerializeToString()
        pixels = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
        exporters.check(what, model, {"pixels": pixels}, encoder.run(pixels))
    return model


def _of_onnx(encoder: ForeignImageEncoder) -> JsonDict:
    """Names of the input, and of the outputs that are the embedding and the tokens, if any."""
    import onnxruntime

    session = onnxruntime.InferenceSession(encoder.source, providers=["CPUExecutionProvider"])
    first, outputs = session.get_inputs()[0].name, session.get_outputs()
    shape = (1, 3, *encoder.image_size) if encoder.channels_first else (1, *encoder.image_size, 3)
    arrays = session.run(None, {first: np.zeros(shape, np.float32)})
    pooled = next(n for n, value in enumerate(arrays) if value.ndim == 2)
    width = arrays[pooled].shape[1]
    tokens = [n for n, v in enumerate(arrays) if v.ndim == 3 and v.shape[2] == width][:1]
    return {"input": first, "outputs": [outputs[n].name for n in (pooled, *tokens)]}


def _lora(hyper: Hypernetwork) -> JsonDict:
    """Sites, and what files of them are called and say."""
    spec, family = hyper.spec, header.check(hyper.facts.get("family"), hyper.spec)
    kohya = writing.kohya_names(spec, family, 2)
    sites = []
    for site in spec.sites:
        window = site.kernel_size if site.kind == "conv" else ()
        down, up = (site.rank, site.in_features, *window), (site.out_features, site.rank)
        sites.append({"path": site.path, "down": down, "up": (*up, *(1 for _ in window))})
    files: dict[str, JsonDict] = {
        "kohya": {
            "names": [kohya[site.path] for site in spec.sites],
            "down": "lora_down",
            "up": "lora_up",
            "alpha": float(spec.max_rank),
            "hash": safetensors_io.KOHYA_HASH,
            "header": header.build(spec, family, hyper.provenance, True),
        },
        "diffusers": {
            "names": [writing.diffusers_name(site.path) for site in spec.sites],
            "file": writing.DIFFUSERS_NAME,
            "down": "lora_A",
            "up": "lora_B",
            "alpha": 0,
            "hash": safetensors_io.OWN_HASH,
            "header": header.build(spec, family, hyper.provenance, False),
        },
    }
    if all(site.component == "unet" for site in spec.sites):  # else a folder for each model
        files["peft"] = files["diffusers"] | {
            "names": [peft_directory.PREFIX + site.path for site in spec.sites],
            "file": peft_directory.WEIGHTS_NAME,
            "adapter_config": peft_directory.config(spec).decode(),
        }
    return {
        "family": family,
        "strength": hyper.default_strength,
        "sites": sites,
        "files": files,
    }


def _below(name: str, tensors: Tensors) -> Tensors:
    return {f"{name}/{own}": value for own, value in tensors.items()}
