"""Regions of a picture, each with its own LoRA and prompt: what `StableDiffusion.sample` is given,
and the rows that the UNet takes (`lora/region_shares.py`)."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.stable_diffusion.networks.lora_argument import count_loras, lora_tree, scaled

NAMED = {
    "all": (0.0, 0.0, 1.0, 1.0),
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of every picture of a batch.

    Attributes:
        place: a name of `NAMED`; a box (x0, y0, x1, y1) in fractions of width and height, also as
            text "0,0,0.5,1"; the file of a mask, white where the region is; or a mask [h, w] or, of
            each picture, [b, h, w], in [0, 1].
        lora: as of `StableDiffusion.sample`: several serve the b pictures; None is the base.
        prompt: one for all pictures or one each; None means the pictures' own.
        strength: of the LoRA.
    """

    place: str | Sequence[float] | AnyArray | os.PathLike
    lora: object = None
    prompt: str | Sequence[str] | None = None
    strength: float | Sequence[float] = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """What b pictures of k regions are drawn from.

    Attributes:
        masks: adding up to 1 at every position of the latents.
        prompts: b · k, region by region of each picture.
        lora: with a leading axis b · k; None where no region has one.
    """

    masks: Float[np.ndarray, "b k h w"]
    prompts: list[str]
    lora: Params | None


def lay_out(
    regions: Sequence[Region], sd: Any, prompts: Sequence[str], size: tuple[int, int]
) -> Rows:
    """Regions of the pictures with these prompts, latents of (height, width) positions.

    Where regions overlap they count alike. Where none is, a region more has the picture's own
    prompt and no LoRA.

    Args:
        sd: a StableDiffusion.

    Raises:
        UserError: a place, a LoRA or prompts that do not fit.
    """
    batch, own = len(prompts), list(prompts)
    covered = np.stack([_mask(region.place, batch, size) for region in regions], 1)
    total = covered.sum(1, keepdims=True)
    asked, trees = [], []
    for region in regions:
        said = own if region.prompt is None else region.prompt
        said = [said] * batch if isinstance(said, str) else list(said)
        if len(said) != batch:
            raise UserError(f"region: {len(said)} prompts, expected one, or {batch}: one a picture")
        asked.append(said)
        trees.append(_loras(region, sd, batch))
    masks = covered / np.maximum(total, 1.0)
    if total.min() < 1.0 - 1e-6:
        masks = np.concatenate([masks, np.maximum(1.0 - total, 0.0)], 1)
        asked, trees = [*asked, own], [*trees, {}]
    lora = None
    if any(trees):
        lora = jax.tree.map(
            lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]),
            factors.stack_padded(trees),
        )
    rows = [region[k] for k in range(batch) for region in asked]
    return Rows(masks.astype(np.float32), rows, lora)


def _loras(region: Region, sd: Any, batch: int) -> Params:
    """A LoRA for each picture, at the region's strength; {} without one."""
    tree = lora_tree(region.lora, sd)
    if tree is None:
        return {}
    tree, count = scaled(tree, region.strength), count_loras(tree)
    if batch % count:
        raise UserError(f"region: {count} LoRAs for {batch} pictures, expected one, or one each")
    if factors.num_loras(tree) is None:
        return factors.repeat(tree, batch)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, batch // count, axis=0), tree)


def _mask(place: Any, batch: int, size: tuple[int, int]) -> Float[np.ndarray, "b h w"]:
    """How much of each position of the latents a region covers."""
    if isinstance(place, str) and (place in NAMED or _numbers(place) is not None):
        place = NAMED.get(place) or _numbers(place)
    if isinstance(place, str | os.PathLike):
        place = _read(place)
    found = np.asarray(place, np.float32)
    if found.ndim == 1:
        mask = _box(found, size)
    elif found.ndim in (2, 3) and (found.ndim == 2 or len(found) == batch):
        if not (found.min() >= 0.0 and found.max() <= 1.0):
            raise UserError(
                f"region: a mask from {found.min():g} to {found.max():g}, expected numbers in "
                "[0, 1]"
            )
        mask = _area_means(_area_means(found, size[0], -2), size[1], -1)
    else:
        raise UserError(
            f"region: a mask of shape {list(found.shape)}, expected [h, w], or [{batch}, h, w]"
        )
    if not mask.any():
        raise UserError(f"region {place!r}: covers nothing of the picture")
    return np.broadcast_to(mask, (batch, *size))


def _numbers(text: str) -> list[float] | None:
    """Numbers between commas; None where it is something else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None


def _read(file: str | os.PathLike) -> Float[np.ndarray, "h w"]:
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return np.asarray(opened.convert("L"), np.float32) / 255.0
    except (OSError, ValueError) as error:
        raise UserError(
            f"region {str(file)!r}: expected {', '.join(NAMED)}, a box x0,y0,x1,y1 in fractions, or"
            f" the picture of a mask ({error})"
        ) from error


def _box(box: Float[np.ndarray, " n"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    valid = box.shape == (4,) and bool(np.all((box >= 0) & (box <= 1)))
    if not (valid and box[0] < box[2] and box[1] < box[3]):
        raise UserError(
            f"region {','.join(f'{x:g}' for x in box)}: expected a box x0,y0,x1,y1 with "
            "0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1"
        )
    columns, rows = (
        np.clip(np.minimum(high * n, at + 1) - np.maximum(low * n, at), 0, 1)
        for low, high, n, at in (
            (box[0], box[2], size[1], np.arange(size[1])),
            (box[1], box[3], size[0], np.arange(size[0])),
        )
    )
    return rows[:, None] * columns[None]


def _area_means(mask: np.ndarray, length: int, axis: int) -> np.ndarray:
    """One axis at another length: every new position is the mean of what it covers."""
    old = mask.shape[axis]
    edges = np.arange(length + 1) * old / length
    starts, ends = edges[:-1, None], edges[1:, None]
    at = np.arange(old)[None]
    weights = np.clip(np.minimum(ends, at + 1) - np.maximum(starts, at), 0, None)
    weights = (weights / weights.sum(1, keepdims=True)).astype(mask.dtype)
    return np.moveaxis(np.moveaxis(mask, axis, -1) @ weights.T, -1, axis)
