"""Which family of base models a LoRA belongs to: "sd1", "sd2" or "sdxl", read from its structure.

Module paths and transformer depth decide first, then the kind of proj_in (a convolution in SD 1.x,
a linear layer later); the width of the text states only breaks ties, so tiny models are
recognised too. A LoRA of any other base is out of scope and refused by its keys.
"""

import functools
import re
from typing import Literal, get_args

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec

Family = Literal["sd1", "sd2", "sdxl"]
FAMILIES: tuple[Family, ...] = get_args(Family)
NAMES: dict[Family, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
_XL = re.compile(
    r"^text_encoder_2\.|^add_embedding\.|^up_blocks\.0\.attentions\."
    r"|\.transformer_blocks\.([1-9]\d*)\."
)
_SD = re.compile(r"^down_blocks\.0\.attentions\.|^up_blocks\.3\.|^down_blocks\.3\.")
_PROJECTION = re.compile(r"\.attentions\.\d+\.proj_(in|out)$")
_TEXT_STATES = re.compile(r"\.attn2\.to_[kv]$")
_WIDTHS: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@functools.lru_cache(maxsize=64)
def recognise(spec: LoraSpec) -> tuple[Family, str]:
    """(family, the evidence in words). Undecidable means "sd1", and the evidence says so."""
    paths = [site.path for site in spec.sites]
    if path := next((path for path in paths if _XL.search(path)), None):
        return "sdxl", f"has {path}"
    kinds = {site.kind for site in spec.sites if _PROJECTION.search(site.path)}
    if kinds == {"conv"}:
        return "sd1", "proj_in and proj_out are convolutions"
    not_xl = next((path for path in paths if _SD.search(path)), None)
    widths = {site.in_features for site in spec.sites if _TEXT_STATES.search(site.path)}
    text = {s.in_features for s in spec.component("text_encoder") if s.path.endswith("q_proj")}
    family = _WIDTHS.get(next(iter(widths))) if len(widths) == 1 else None
    if kinds == {"linear"}:
        if not_xl is None and family == "sdxl":
            return "sdxl", "linear proj_in and text states of width 2048"
        return "sd2", "proj_in and proj_out are linear layers"
    if family is not None and not (family == "sdxl" and not_xl):
        return family, f"text states of width {widths.pop()}"
    if not widths and text and text <= {768, 1024}:
        width = text.pop()
        return _WIDTHS[width], f"text encoder of width {width}"
    return "sd1", "undecidable from its sites; taken as Stable Diffusion 1.x"


def check(family: str | None, spec: LoraSpec) -> Family:
    """The given family, or the recognised one when it is None. Raises UserError if unknown."""
    if family is None:
        return recognise(spec)[0]
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is unknown; expected one of {list(FAMILIES)}")
    return family
