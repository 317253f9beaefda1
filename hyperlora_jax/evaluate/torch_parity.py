"""Exported files in PyTorch: load with diffusers, draw from the same noise, compare with JAX."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import Float
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.lora_files.verify import load_modules, verify
from hyperlora_jax.shipped import base_path


@dataclasses.dataclass(frozen=True, eq=False)
class TorchParity:
    """What PyTorch diffusers made of the files.

    Attributes:
        max_abs_diff: largest difference of a pixel in [0, 1], JAX against PyTorch, float32.
        change: mean difference that the LoRA makes to PyTorch's own pictures.
        missing_keys, unexpected_keys: over all files.
        jax_images, torch_images: [f, h, w, 3], one per file.
    """

    max_abs_diff: float
    change: float
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    jax_images: Float[np.ndarray, "f h w 3"]
    torch_images: Float[np.ndarray, "f h w 3"]

    def to_json(self) -> dict[str, Any]:
        """For metrics.json: key lists as counts."""
        return {
            "max_abs_diff": self.max_abs_diff,
            "output_change": self.change,
            "missing_keys": len(self.missing_keys),
            "unexpected_keys": len(self.unexpected_keys),
            "files": len(self.jax_images),
        }


def compare_with_torch(
    sd: Any,
    base: str,
    files: Sequence[Path],
    prompts: Sequence[str],
    *,
    num_steps: int = 20,
    seed: int = 0,
) -> TorchParity:
    """Draws one picture per (file, prompt) with both frameworks from the same noise.

    Args:
        sd: the base in JAX; `base`: where PyTorch reads it.

    Raises:
        UserError: PyTorch, diffusers or peft is not installed.
    """
    settings = sd.unet.settings
    random = np.random.default_rng(seed)
    shape = (len(files), *settings.sample_size, settings.in_channels)
    noise = random.standard_normal(shape).astype(np.float32)
    jax_images = []
    for k, path in enumerate(files):
        lora, _ = load_lora(path, sd)
        batched = jax.tree.map(lambda leaf: leaf[None], lora)
        image = sd.sample(
            jax.random.key(0),
            [prompts[k]],
            lora=batched,
            num_steps=num_steps,
            guidance=1.0,
            latents=noise[k, None],
        )
        jax_images.append(np.asarray(image)[0])
    with_lora, without = _torch_images(base_path(base), files, prompts, noise, num_steps)
    modules = load_modules(base_path(base))
    checks = [verify(path, modules) for path in files]
    ours = np.stack(jax_images)
    return TorchParity(
        max_abs_diff=float(np.abs(ours - with_lora).max()),
        change=float(np.abs(with_lora - without).mean()),
        missing_keys=tuple(key for check in checks for key in check.missing_keys),
        unexpected_keys=tuple(key for check in checks for key in check.unexpected_keys),
        jax_images=ours,
        torch_images=with_lora,
    )


def _torch_images(
    base: str, files: Sequence[Path], prompts: Sequence[str], noise: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with and without the LoRA, by StableDiffusionPipeline.load_lora_weights."""
    with _quiet():
        try:
            import torch
            from diffusers import StableDiffusionPipeline
        except ImportError as error:
            raise UserError(
                f"PyTorch comparison: {error.name} is not installed, "
                "expected the extra `pip install hyperlora-jax[torch]`"
            ) from error
        pipe = StableDiffusionPipeline.from_pretrained(
            base, safety_checker=None, torch_dtype=torch.float32
        )
        pipe.set_progress_bar_config(disable=True)

        def draw(k: int) -> np.ndarray:
            latents = torch.from_numpy(np.ascontiguousarray(noise[k, None].transpose(0, 3, 1, 2)))
            result = pipe(
                prompts[k],
                latents=latents,
                num_inference_steps=num_steps,
                guidance_scale=1.0,
                output_type="np",
            )
            return result.images[0]

        without = [draw(k) for k in range(len(files))]
        with_lora = []
        for k, path in enumerate(files):
            name = f"lora_{k}"
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
            with_lora.append(draw(k))
            pipe.unload_lora_weights()
    return np.stack(with_lora), np.stack(without)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch libraries' notes on loading, which are about other use than this."""
    names = ("diffusers", "transformers", "peft")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
