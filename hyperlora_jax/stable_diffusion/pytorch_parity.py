"""A diffusers directory in both frameworks: the same inputs, one forward pass, the differences.

PyTorch runs in a process of its own (`pytorch_forward`) and has ended before the same component is
read here: a machine needs the memory of one component in one framework, in float32.
"""

import dataclasses
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files.base_files import read_json
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.networks.unet import UNet, unet_from_config
from hyperlora_jax.stable_diffusion.weights import loading

PARTS = ("unet", "vae", "text")
PROMPTS = ("a photo of a cat on a red chair", "an oil painting of two boats, a storm behind them")
TOLERANCE = 1e-4
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One output: max |JAX - PyTorch| relative to max |PyTorch|, both float32."""

    output: str
    relative_error: float
    max_abs: float

    @property
    def ok(self) -> bool:
        """True when both agree to `TOLERANCE` and the output is finite and not all zero."""
        return self.relative_error <= TOLERANCE and 0 < self.max_abs < float("inf")


def compare(
    root: Path,
    variant: str | None = None,
    parts: Sequence[str] = PARTS,
    latent_size: int = 32,
    seed: int = 0,
) -> Iterator[Difference]:
    """Yields the difference of every output of the components that the directory holds.

    Latents are at most `latent_size` wide, whatever size the model was trained for.

    Raises:
        UserError: no UNet in the directory, PyTorch is missing, or it cannot read a component.
    """
    unet = unet_from_config(read_json(root / "unet" / "config.json"))
    folders = {"unet": "unet", "vae": "vae", "text": "text_encoder*"}
    for part in parts:
        if not any(root.glob(folders[part])):
            continue
        inputs = _inputs(root, part, unet, latent_size, np.random.default_rng(seed))
        theirs = _pytorch(root, part, inputs, variant)
        ours = _RUN[part](root, unet, inputs, variant)
        for name, expected in theirs.items():
            scale = float(np.abs(expected).max())
            error = float(np.abs(ours[name] - expected).max()) / scale if scale else float("nan")
            yield Difference(f"{part}.{name}", error, scale)
        del ours
        gc.collect()


def _inputs(root: Path, part: str, unet: UNet, size: int, rng: np.random.Generator) -> Arrays:
    settings = unet.settings

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    height, width = (min(size, side) for side in settings.sample_size)
    if part == "text":
        return {"prompts": np.array(PROMPTS), "is_xl": np.array(_is_xl(unet))}
    if part == "vae":
        config = read_json(root / "vae" / "config.json")
        vae = loading.CONSTRUCTORS["vae"](config)
        images = rng.uniform(-1, 1, (1, height * vae.downsampling, width * vae.downsampling, 3))
        latents = normal(1, height, width, vae.values["latent_channels"])
        return {"images": images.astype(np.float32), "latents": latents}
    inputs = {
        "latents": normal(2, height, width, settings.in_channels),
        "timesteps": np.array([17, 801]),
        "text_states": normal(2, 77, settings.context_width),
    }
    if settings.guidance_width:
        inputs["timestep_cond"] = normal(2, settings.guidance_width)
    if _is_xl(unet):
        pooled = (settings.addition_input_width or 0) - 6 * (settings.addition_time_width or 0)
        inputs["text_embeds"] = normal(2, pooled)
        inputs["time_ids"] = np.array([[512, 640, 0, 8, 512, 640]] * 2, np.float32)
    return inputs


def _is_xl(unet: UNet) -> bool:
    return unet.settings.addition_time_width is not None


def _pytorch(root: Path, part: str, inputs: Arrays, variant: str | None) -> Arrays:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(source, **inputs)
        module = "hyperlora_jax.stable_diffusion.pytorch_forward"
        done = subprocess.run(
            [sys.executable, "-m", module, str(root), part, str(source), str(target)]
            + ([variant] if variant else []),
            capture_output=True,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            raise UserError(f"{root}: PyTorch cannot run the {part} ({reason})")
        with np.load(target, allow_pickle=False) as file:
            return dict(file)


def _run_unet(root: Path, unet: UNet, inputs: Arrays, variant: str | None) -> Arrays:
    module, params = loading.load_component(root / "unet", "unet", jnp.float32, variant)
    names = ("text_embeds", "time_ids", "timestep_cond")
    added = {name: inputs[name] for name in names if name in inputs}
    prediction = jax.jit(module.apply)(
        {"params": params},
        inputs["latents"],
        inputs["timesteps"],
        inputs["text_states"],
        added or None,
    )
    return {"prediction": np.asarray(prediction)}


def _run_vae(root: Path, unet: UNet, inputs: Arrays, variant: str | None) -> Arrays:
    vae, params = loading.load_component(root / "vae", "vae", jnp.float32, variant)
    encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))
    decode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="decode"))
    mean, logvar = encode(params, inputs["images"])
    outputs = {"mean": mean, "logvar": logvar, "decoded": decode(params, inputs["latents"])}
    return {name: np.asarray(value) for name, value in outputs.items()}


def _run_text(root: Path, unet: UNet, inputs: Arrays, variant: str | None) -> Arrays:
    modules, params = {}, {}
    for name in ("text_encoder", "text_encoder_2"):
        if (root / name).is_dir():
            modules[name], params[name] = loading.load_component(
                root / name, name, jnp.float32, variant
            )
    sd = StableDiffusion(unet, params, NoiseSchedule(), **modules, path=root)
    embeddings = sd.embed_prompts([str(prompt) for prompt in inputs["prompts"]])
    return {name: np.asarray(value) for name, value in embeddings.items()}


_RUN = {"unet": _run_unet, "vae": _run_vae, "text": _run_text}
