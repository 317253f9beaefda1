"""What a visitor asks for, checked, and what is drawn and written for it; nothing of Gradio.

Errors are `UserError`s, whose text is what the visitor reads.
"""

import base64
import html
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.familiarity import UNFAMILIAR
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.pictures.pictures import (
    encode_png,
    magnified,
    reference_pixels,
    upright_size,
)
from hyperlora_jax.serve.studio import MOST_PICTURES, Studio, Subject

MOST_PIXELS = 40_000_000  # of an uploaded picture: a few KB can unpack to gigabytes
MOST_PROMPTS = 4
MOST_LETTERS = 1000  # of a prompt
MOST_STRENGTH = 3.0
FORMATS = ("kohya", "diffusers", "peft")


def read_pictures(paths: Sequence[str], studio: Studio) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The uploaded pictures as the encoder sees them.

    Raises:
        UserError: none or too many, a file that is no picture or too large; names the file alone,
            not its folder.
    """
    if not paths:
        raise UserError("no picture yet, drop one first")
    if len(paths) > MOST_PICTURES:
        raise UserError(f"found {len(paths)} pictures, expected at most {MOST_PICTURES}")
    return [_pixels(Path(path), studio) for path in paths]


def _pixels(path: Path, studio: Studio) -> UInt8[np.ndarray, "h w 3"]:
    try:
        height, width = upright_size(path)
        if height * width > MOST_PIXELS:
            raise UserError(
                f"{path.name}: has {width} × {height} pixels, expected at most "
                f"{MOST_PIXELS // 1_000_000} million"
            )
        return reference_pixels(path, studio.hyper.encoder)
    except UserError as error:
        text = str(error).replace(str(path), path.name)
        if "decompression bomb" in text:  # Pillow's word, at sizes far above ours
            text = f"{path.name}: has more than {MOST_PIXELS // 1_000_000} million pixels"
        raise UserError(text) from None


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
    encoded = encode_png(magnified(pixels))
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"


def write_files(
    studio: Studio,
    subject: Subject,
    folder: Path,
    name: str,
    *,
    strength: float,
    seed: int,
    edits: Mapping[str, float],
) -> list[Path]:
    """The LoRA as it is drawn with, in the forms of `FORMATS`; the last one as a zip.

    Args:
        folder: a new one of this request.
        name: of the uploaded picture.
    """
    stem = re.sub(r"[^\w-]+", "_", Path(name).stem)[:60].strip("_") or "subject"
    lora, spec = studio.lora(subject, strength, edits)
    texts = {**studio.hyper.provenance, "seed": seed, "strength": strength}
    family = studio.hyper.facts["family"]
    files = []
    for form in FORMATS[:2]:
        path = folder / f"{stem}.{form}.safetensors"
        save_lora(path, lora, spec, format=form, family=family, metadata=texts)
        files.append(path)
    peft = folder / f"{stem}.peft"
    save_lora(peft, lora, spec, format="peft", family=family, metadata=texts)
    with zipfile.ZipFile(folder / f"{stem}.peft.zip", "w") as archive:
        for path in sorted(peft.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    shutil.rmtree(peft)
    return [*files, folder / f"{stem}.peft.zip"]
