"""What a visitor asks for, checked, and what is drawn and written for it; nothing of Gradio.

Errors are `UserError`s, whose text is what the visitor reads.
"""

import base64
import html
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.familiarity import UNFAMILIAR
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.pictures.pictures import (
    SMALLEST_SIDE,
    encode_png,
    magnified,
    reference_pixels,
    upright_size,
)
from hyperlora_jax.serve.studio import MOST_PICTURES, Studio, Subject

MOST_PIXELS = 40_000_000  # of an uploaded picture: a few KB can unpack to gigabytes
MOST_PROMPTS = 4
PNG_LEVEL = 1  # a third of the usual time, a tenth larger
MOST_LETTERS = 1000  # of a prompt
MOST_STRENGTH = 3.0
MOST_SEED = 2**31 - 1
EDIT = 2.0  # how far an edit goes either way
FORMATS = ("kohya", "diffusers", "peft")


def read_pictures(
    given: Sequence[tuple[str, bytes]], studio: Studio
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The uploaded pictures (name, content) as the encoder sees them.

    Raises:
        UserError: none or too many, a file that is no picture, too small or too large.
    """
    if not given:
        raise UserError("no picture yet, drop one first")
    if len(given) > MOST_PICTURES:
        raise UserError(f"found {len(given)} pictures, expected at most {MOST_PICTURES}")
    return [_pixels(name, encoded, studio) for name, encoded in given]


def _pixels(name: str, encoded: bytes, studio: Studio) -> UInt8[np.ndarray, "h w 3"]:
    try:
        height, width = upright_size(encoded, name)
    except UserError as error:
        if "decompression bomb" not in str(error):  # Pillow's word, at sizes far above ours
            raise
        raise UserError(
            f"{name}: has more than {MOST_PIXELS // 1_000_000} million pixels"
        ) from None
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{name}: has {width} × {height} pixels, expected at most "
            f"{MOST_PIXELS // 1_000_000} million"
        )
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f"{name}: has {width} × {height} pixels, expected at least {SMALLEST_SIDE} × "
            f"{SMALLEST_SIDE}"
        )
    return reference_pixels(encoded, studio.hyper.encoder, name)


def read_prompts(text: str) -> list[str]:
    """A prompt for each line.

    Raises:
        UserError: none, too many or too long ones.
    """
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise UserError(f"found {len(prompts)} prompts, expected 1 to {MOST_PROMPTS}, one a line")
    if any(len(prompt) > MOST_LETTERS for prompt in prompts):
        raise UserError(f"a prompt is longer than {MOST_LETTERS} letters")
    return prompts


def number(given: float | int | None, name: str, low: float, high: float) -> float:
    """A number of a slider, which a request may send without the slider.

    Raises:
        UserError: no number, or one out of its range.
    """
    if given is None or not low <= given <= high:
        raise UserError(f"{name} is {given}, expected {low:g} to {high:g}")
    return float(given)


def about(subject: Subject) -> str:
    """Time and familiarity in words."""
    said = f"The LoRA took **{1000 * subject.seconds:.0f} ms**."
    if subject.familiarity is None:
        return said
    said += f" Familiarity: **{subject.familiarity:.2f}**"
    if subject.familiarity >= UNFAMILIAR:
        return f"{said} (0: like nobody this was trained on, 1: very much like somebody)."
    return (
        f"{said}. **Careful: this is like nobody that the checkpoint was trained on, the pictures "
        "may show somebody else.**"
    )


def table(
    references: Sequence[UInt8[np.ndarray, "h w 3"]],
    prompts: Sequence[str],
    generated: UInt8[np.ndarray, "p h w 3"],
    base: UInt8[np.ndarray, "p h w 3"],
) -> str:
    """HTML: a row for each prompt, with the reference, the LoRA's and the base's picture."""
    rows = [
        "<div class='head'>Reference</div><div class='head'>With the LoRA</div>"
        "<div class='head'>Base alone</div>"
    ]
    for k, prompt in enumerate(prompts):
        text = html.escape(prompt, quote=True)
        shown = (
            (references[k % len(references)], "the reference"),
            (generated[k], f"with the LoRA: {text}"),
            (base[k], f"base alone: {text}"),
        )
        rows.append(f"<div class='prompt'>{text}</div>")
        rows += [f"<img src='{_data_uri(pixels)}' alt='{alt}'>" for pixels, alt in shown]
    return f"<div class='sides'>{''.join(rows)}</div>"


def _data_uri(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    encoded = encode_png(magnified(pixels), PNG_LEVEL)
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"


def links(key: str, picture: str, numbers: Mapping[str, float]) -> str:
    """HTML: a download for each form.

    Args:
        key: of the kept LoRA.
        picture: name of the uploaded one.
        numbers: strength, seed and edits, as the endpoint calls them.
    """
    asked = html.escape(urlencode({"name": picture, **numbers}), quote=True)
    anchors = [
        f"<a id='download-{form}' href='v1/lora/{key}/{form}?{asked}' download>Download, {form}</a>"
        for form in FORMATS
    ]
    return f"<div class='downloads'>{''.join(anchors)}</div>"


def lora_file(
    studio: Studio,
    subject: Subject,
    folder: Path,
    form: str,
    *,
    strength: float,
    seed: int,
    edits: Mapping[str, float],
) -> Path:
    """A file of the LoRA as it is drawn with, in a form of `FORMATS`; PEFT's folder as a zip.

    Args:
        folder: a new one of this request.
    """
    lora, spec = studio.lora(subject, strength, edits)
    texts = {**studio.hyper.provenance, "seed": seed, "strength": strength}
    path = folder / ("lora" if form == "peft" else "lora.safetensors")
    save_lora(path, lora, spec, format=form, family=studio.hyper.facts["family"], metadata=texts)
    if form != "peft":
        return path
    with zipfile.ZipFile(folder / "lora.zip", "w") as archive:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(path))
    return folder / "lora.zip"


def file_name(picture: str, form: str) -> str:
    """What a LoRA's file is called, after an uploaded picture."""
    stem = re.sub(r"[^\w-]+", "_", Path(picture).stem)[:60].strip("_") or "subject"
    return f"{stem}.{form}.{'zip' if form == 'peft' else 'safetensors'}"
