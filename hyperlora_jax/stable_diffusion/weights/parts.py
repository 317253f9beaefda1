"""Whether the parts of a base belong together: widths, channels, vocabularies.

Files of different models in one folder (another VAE, a refiner, an inpainting UNet) have sound
configs each; only side by side do they show it.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.autoencoder import AutoencoderKL
from hyperlora_jax.stable_diffusion.networks.clip_text import ClipTextModel
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.networks.unet_config import NUM_SIZES, UNetConfig

Component = UNet | AutoencoderKL | ClipTextModel


def check_parts(modules: Mapping[str, Component], where: Path | str) -> None:
    """Compares the configs of the components that are there ("unet", "vae", "text_encoder", …).

    Raises:
        UserError: two parts of different widths, with both numbers.
    """
    unet, vae = modules["unet"].settings, modules.get("vae")
    latents = unet.out_channels if vae is None else vae.values["latent_channels"]
    # Beside the latents: nothing, a picture (pix2pix), or one and its mask (inpainting).
    if unet.in_channels not in (latents, 2 * latents, 2 * latents + 1):
        raise UserError(
            f"{where}: the UNet takes {unet.in_channels} channels, the autoencoder makes {latents};"
            f" expected a UNet of {latents} channels, or of {2 * latents} or {2 * latents + 1} "
            "(pix2pix, inpainting)"
        )
    if unet.out_channels != latents:
        raise UserError(
            f"{where}: the UNet takes {unet.in_channels} channels and makes {unet.out_channels} "
            f"(a learned variance?), expected one that makes {latents}"
        )
    texts = [modules[n] for n in ("text_encoder", "text_encoder_2") if n in modules]
    if not texts:
        return
    xl = unet.addition_time_width is not None
    widths = [text.values["hidden_size"] for text in (texts if xl else texts[:1])]
    if xl:
        _check_pooled(unet, texts[-1], where)
    if sum(widths) != unet.context_width:
        found = " + ".join(map(str, widths))
        raise UserError(
            f"{where}: text encoders give states of width {found}, the UNet's cross-attention "
            f"takes {unet.context_width}"
        )


def _check_pooled(unet: UNetConfig, text: ClipTextModel, where: Path | str) -> None:
    values = text.values
    pooled = values["projection_dim"] if text.has_projection else values["hidden_size"]
    time = unet.addition_time_width or 0
    if unet.addition_input_width == pooled + 5 * time:
        raise UserError(
            f"{where}: the UNet takes 5 sizes and scores instead of 6 sizes (an SDXL refiner), "
            "expected an SDXL base"
        )
    if unet.addition_input_width != pooled + NUM_SIZES * time:
        raise UserError(
            f"{where}: the UNet's added embedding takes {unet.addition_input_width} numbers, the "
            f"pooled text state and {NUM_SIZES} sizes are {pooled} + {NUM_SIZES} x {time}"
        )


def check_token_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises UserError for token ids [b, n] beyond the embedding table's `vocab_size` rows."""
    if ids.size and int(ids.max()) >= vocab_size:
        raise UserError(
            f"tokenizer: gives token {int(ids.max())}, the text encoder's table has "
            f"{vocab_size} rows; they belong to different models"
        )
