"""One forward pass of a component of a diffusers directory in PyTorch, in a process of its own.

    python -m hyperlora_jax.stable_diffusion.pytorch_forward ROOT PART IN.npz OUT.npz [VARIANT]

Arrays in the files are laid out as in Flax (NHWC). JAX is not used here, so that only one of the
two frameworks holds the weights of a large model at a time.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hyperlora_jax.lora_files.verify import pipeline_of

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray]


def forward(root: Path, part: str, inputs: Arrays, variant: str | None = None) -> Arrays:
    """Outputs of "unet", "vae" or "text" in float32."""
    import torch

    with torch.no_grad():
        outputs = {"unet": _unet, "vae": _vae, "text": _text}[part](root, inputs, variant)
    return {name: _numpy(value) for name, value in outputs.items() if value is not None}


def _unet(root: Path, inputs: Arrays, variant: str | None) -> Mapping[str, object]:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        root / "unet", variant=variant, torch_dtype=torch.float32
    ).eval()
    added = None
    if "text_embeds" in inputs:
        added = {name: torch.from_numpy(inputs[name]) for name in ("text_embeds", "time_ids")}
    guidance = inputs.get("timestep_cond")
    prediction = unet(
        _nchw(inputs["latents"]),
        torch.from_numpy(inputs["timesteps"]),
        torch.from_numpy(inputs["text_states"]),
        timestep_cond=None if guidance is None else torch.from_numpy(guidance),
        added_cond_kwargs=added,
    ).sample
    return {"prediction": prediction}


def _vae(root: Path, inputs: Arrays, variant: str | None) -> Mapping[str, object]:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(
        root / "vae", variant=variant, torch_dtype=torch.float32
    ).eval()
    (posterior,) = vae.encode(_nchw(inputs["images"]), return_dict=False)
    (decoded,) = vae.decode(_nchw(inputs["latents"]), return_dict=False)
    return {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded}


def _text(root: Path, inputs: Arrays, variant: str | None) -> Mapping[str, object]:
    """The pipeline's own `encode_prompt`; which pipeline it is, the UNet's config says."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    parts: dict[str, object] = {}
    for name, kind in (
        ("text_encoder", CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        tokenizer = name.replace("text_encoder", "tokenizer")
        if (root / name).is_dir():
            model = kind.from_pretrained(root / name, variant=variant, dtype=torch.float32)
            parts[name] = model.eval()
            parts[tokenizer] = CLIPTokenizer.from_pretrained(root / tokenizer)
    prompts = [str(prompt) for prompt in inputs["prompts"]]
    is_xl = bool(inputs["is_xl"])
    states, *others = pipeline_of(parts, is_xl).encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"states": states, "pooled": others[1]} if is_xl else {"states": states}


def _nchw(array: np.ndarray) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    array = tensor.float().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def main(arguments: list[str]) -> None:
    """Reads the inputs, writes the outputs."""
    root, part, source, target, *variant = arguments
    logging.disable(logging.WARNING)
    with np.load(source, allow_pickle=False) as file:
        inputs = dict(file)
    np.savez(target, **forward(Path(root), part, inputs, *variant))


if __name__ == "__main__":
    main(sys.argv[1:])
