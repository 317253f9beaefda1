"""Whether the parts of a base belong together: widths, channels, vocabularies.

Files of different models in one folder (another VAE, a refiner, an inpainting UNet) have sound
configs each; only side by side do they show it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.unet_config import NUM_SIZES

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def check_parts(modules: Mapping[str, Any], where: Path | str) -> None:
    """Compares the configs of the components that are there ("unet", "vae", "text_encoder", …).

    Raises:
        UserError: two parts of different widths, with both numbers.
    """
    unet, vae = modules["unet"].settings, modules.get("vae")
    if vae is not None and vae.values["latent_channels"] != unet.in_channels:
        latents = vae.values["latent_channels"]
        kind = {9: " (an inpainting model)", 8: " (a pix2pix model)"}.get(unet.in_channels, "")
        raise UserError(
            f"{where}: the UNet takes {unet.in_channels} channels{kind}, the autoencoder makes "
            f"{latents}; expected a text-to-image UNet of {latents} channels"
        )
    if unet.out_channels != unet.in_channels:
        raise UserError(
            f"{where}: the UNet takes {unet.in_channels} channels and makes {unet.out_channels} (a "
            f"learned variance?), expected {unet.in_channels}"
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


def _check_pooled(unet: Any, text: Any, where: Path | str) -> None:
    values = text.values
    pooled = values["projection_dim"] if text.has_projection else values["hidden_size"]
    time = unet.addition_time_width
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


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer of a folder.

    Raises:
        UserError: no folder, or without its vocabulary (transformers would make an empty one, and
            all prompts alike: findings/empty_vocabulary.sh).
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: folder not found, expected the tokenizer of the model")
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder}: has no vocabulary, expected {' or '.join(TOKENIZER_FILES)}")
    if present == ["vocab.json"] and not (folder / "merges.txt").is_file():
        raise UserError(f"{folder}: has vocab.json without merges.txt, expected both")
    from transformers import CLIPTokenizer

    try:
        found = CLIPTokenizer.from_pretrained(str(folder))
        if found.model_max_length < 3:
            raise ValueError(f"model_max_length is {found.model_max_length}, expected 3 or more")
        found(["a"], padding="max_length", max_length=3, truncation=True)
        return found
    except BaseException as error:  # tokenizers raises bare exceptions, and panics that are none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be read as a CLIP tokenizer ({reason})") from error


def check_token_ids(ids: Any, vocab_size: int) -> None:
    """Raises UserError for token ids [b, n] beyond the embedding table's `vocab_size` rows."""
    if ids.size and int(ids.max()) >= vocab_size:
        raise UserError(
            f"tokenizer: gives token {int(ids.max())}, the text encoder's table has "
            f"{vocab_size} rows; they belong to different models"
        )
