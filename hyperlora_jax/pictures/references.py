"""What people have for reference pictures, as what a condition encoder sees of them.

    one picture            a path, a Pillow picture, encoded bytes, or an array [h, w, 3]
    a picture per subject  a list of those, or [l, h, w, 3]
    several per subject    a list of lists (of different lengths too), or [l, k, h, w, 3]

Arrays are uint8, or floats in [0, 1]; a fourth channel is transparency. Whatever has not the
encoder's size is cut and resampled as files are (`pictures/pictures.py`), floats to 8 bits before.
Only inside of `jit` and `vmap`, where nothing can be looked at, the encoder resizes by itself.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Float
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import pictures

T = TypeVar("T")
SMALL = 2**22  # numbers
ROUNDING = 1e-3  # how far resampled floats may lie outside of [0, 1]
EXPECTED = "expected paths, Pillow pictures, uint8 arrays or floats in [0, 1], [..., h, w, 3]"


def read_references(references: object, encoder: ImageEncoder) -> list[Float[AnyArray, "k h w 3"]]:
    """The pictures of every subject, in [0, 1], at the encoder's size.

    Args:
        references: see the table above.
        encoder: an `ImageEncoder`.

    Raises:
        UserError: no picture, a file that is none, an array of another shape, dtype, range.
    """
    if is_array(references):
        return list(_subjects(references, encoder))
    if not isinstance(references, list | tuple):
        return [_picture(references, encoder, "references")[None]]
    return [_subject(own, encoder, f"references[{n}]") for n, own in enumerate(_some(references))]


def by_number(
    references: object, encoder: ImageEncoder
) -> list[tuple[list[int], Float[AnyArray, "l k h w 3"]]]:
    """Subjects with equally many pictures together: (their places, pictures), fewest first; errors
    as in `read_references`."""
    if is_array(references):
        shown = _subjects(references, encoder)
        return [(list(range(len(shown))), shown)]
    subjects = read_references(references, encoder)
    groups: dict[int, list[int]] = {}
    for place, own in enumerate(subjects):
        groups.setdefault(len(own), []).append(place)
    return [
        (places, _stacked([subjects[n] for n in places], "references"))
        for _, places in sorted(groups.items())
    ]


def is_array(given: object) -> bool:
    """numpy, JAX, traced ones too."""
    return isinstance(given, np.ndarray | jax.Array)


def _subjects(array: AnyArray, encoder: ImageEncoder) -> Float[AnyArray, "l k h w 3"]:
    """[h, w, c], [l, h, w, c] or [l, k, h, w, c] with all axes."""
    own = _checked(array, encoder, "references", (3, 4, 5))
    return own[None, None] if own.ndim == 3 else own[:, None] if own.ndim == 4 else own


def _subject(given: object, encoder: ImageEncoder, where: str) -> Float[AnyArray, "k h w 3"]:
    if is_array(given):
        checked = _checked(given, encoder, where, (3, 4))
        return checked[None] if checked.ndim == 3 else checked
    if isinstance(given, list | tuple):
        own = [_picture(one, encoder, f"{where}[{k}]") for k, one in enumerate(_some(given, where))]
        return _stacked(own, where)
    return _picture(given, encoder, where)[None]


def _picture(given: object, encoder: ImageEncoder, where: str) -> Float[AnyArray, "h w 3"]:
    from PIL import Image

    if is_array(given):
        return _checked(given, encoder, where, (3,))
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    if not isinstance(given, str | bytes | Image.Image):
        raise UserError(f"{where}: found {type(given).__name__}, {EXPECTED}")
    pixels = pictures.reference_pixels(given, encoder, where)
    return pixels.astype(np.float32) / np.float32(255)


def _checked(
    array: AnyArray, encoder: ImageEncoder, where: str, dimensions: Sequence[int]
) -> Float[AnyArray, "*any h w 3"]:
    """Float32 pixels at the encoder's size of pictures in an array."""
    shape = tuple(array.shape)
    if len(shape) not in dimensions or shape[-1] not in (3, 4) or 0 in shape:
        raise UserError(f"{where}: found an array of shape {list(shape)}, {EXPECTED}")
    whole = array.dtype == np.uint8
    if not whole and not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{where}: found an array of {array.dtype}, {EXPECTED}")
    if isinstance(array, jax.core.Tracer):
        if shape[-1] == 4:
            raise UserError(f"{where}: found a traced array of shape {list(shape)}, {EXPECTED}")
        return jnp.asarray(array, jnp.float32) / (255.0 if whole else 1.0)
    if not whole:
        # Two small reductions on a device take longer than a look at a few pictures here.
        looked_at = np.asarray(array) if array.size <= SMALL else array
        low, high = float(looked_at.min()), float(looked_at.max())  # NaN, if there is one
        if not -ROUNDING <= low <= high <= 1 + ROUNDING:
            raise UserError(f"{where}: found floats from {low:g} to {high:g}, {EXPECTED}")
    if shape[-3:] == (*encoder.image_size, 3):
        if whole:
            return array.astype(np.float32) / np.float32(255)
        return array if array.dtype == np.float32 else array.astype(np.float32)
    return _resampled(np.asarray(array), encoder, where)


def _resampled(
    array: np.ndarray, encoder: ImageEncoder, where: str
) -> Float[np.ndarray, "*any h w 3"]:
    from PIL import Image

    if array.dtype != np.uint8:
        clipped = np.clip(array.astype(np.float32), 0.0, 1.0)
        array = (clipped * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    flat = array.reshape(-1, *array.shape[-3:])
    seen = [
        pictures.of_pillow(Image.fromarray(one), encoder.image_size, where)
        for one in map(np.ascontiguousarray, flat)
    ]
    resampled = np.stack(seen).reshape(*array.shape[:-3], *seen[0].shape)
    return resampled.astype(np.float32) / np.float32(255)


def _some(given: Sequence[T], where: str = "references") -> Sequence[T]:
    if not given:
        raise UserError(f"{where}: holds no picture, expected at least one")
    return given


def _stacked(arrays: Sequence[AnyArray], where: str) -> AnyArray:
    if not any(isinstance(array, jax.core.Tracer) for array in arrays):
        return np.stack([np.asarray(array) for array in arrays])
    shapes = sorted({tuple(array.shape) for array in arrays})
    if len(shapes) > 1:
        raise UserError(f"{where}: traced pictures have the shapes {shapes}, expected one")
    return jnp.stack(arrays)
