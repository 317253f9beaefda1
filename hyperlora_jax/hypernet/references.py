"""Reads reference pictures from files and refuses those that cannot serve, with the reason.

Policy: EXIF orientation is applied, transparency becomes white, several frames mean the first one,
and a picture that is not square is cropped around its centre. With a detector (faces: none is
bundled, any callable fits) the picture must show exactly one subject of a sufficient size, and the
crop follows the detector's box instead of the centre.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from hyperlora_jax.array_types import Float
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SMALLEST_SIDE = 8  # pixels; below this a picture holds no subject

# A detector takes a picture [h, w, 3] in [0, 1] and returns boxes [n, 4]: x0, y0, x1, y1 in pixels.
Detector = Callable[[np.ndarray], np.ndarray]
# An aligner takes the picture and one box [4] and returns the aligned picture [h', w', 3].
Aligner = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SubjectPolicy:
    """Which references are accepted when a detector is given.

    Attributes:
      detect: finds subjects (see `Detector`).
      align: maps picture and box to an aligned picture; None crops the box, grown by `margin`.
      smallest_side: a box whose shorter side has fewer pixels is refused.
      margin: how much the square crop grows beyond the box, as a fraction of its longer side.
    """

    detect: Detector
    align: Aligner | None = None
    smallest_side: int = 32
    margin: float = 0.3


def read_reference(
    path: epath.PathLike, size: int | None = None, policy: SubjectPolicy | None = None
) -> Float[np.ndarray, "h w 3"]:
    """One reference picture as float32 in [0, 1], square, resized to `size` when given.

    Raises:
      UserError: no such file, not a picture, too small; with a policy also no subject, several
        subjects, or a subject that is too small.
    """
    image = _open(path)
    if min(image.size) < SMALLEST_SIDE:
        raise UserError(
            f"reference {path}: {image.size[0]}x{image.size[1]} pixels, "
            f"expected at least {SMALLEST_SIDE}x{SMALLEST_SIDE}"
        )
    if policy is None:
        image = _centre_square(image)
    else:
        image = _one_subject(image, path, policy)
    if size is not None and image.size != (size, size):
        from PIL import Image

        # Whole factors are averaged box by box: drawn pixels stay as crisp as they were.
        whole = image.size[0] % size == 0
        kernel = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
        image = image.resize((size, size), kernel)
    return np.asarray(image, np.float32) / 255.0


def read_references(
    paths: Sequence[epath.PathLike], size: int, policy: SubjectPolicy | None = None
) -> Float[np.ndarray, "b h w 3"]:
    """Several reference pictures of one size; errors as in `read_reference`."""
    if not paths:
        raise UserError("references: none given, expected at least one picture file")
    return np.stack([read_reference(path, size, policy) for path in paths])


def _open(path: epath.PathLike) -> "Image.Image":
    from PIL import Image, ImageOps, UnidentifiedImageError

    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"reference {path}: no such file, expected a picture")
    if file.is_dir():
        raise UserError(f"reference {path}: is a folder, expected a picture file")
    try:
        with file.open("rb") as stream, Image.open(stream) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"reference {path}: cannot be read as a picture ({type(error).__name__}), "
            "expected PNG, JPEG, WebP or another format that Pillow reads"
        ) from error
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _centre_square(image: "Image.Image") -> "Image.Image":
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _one_subject(
    image: "Image.Image", path: epath.PathLike, policy: SubjectPolicy
) -> "Image.Image":
    from PIL import Image

    pixels = np.asarray(image, np.float32) / 255.0
    boxes = np.asarray(policy.detect(pixels), np.float32).reshape(-1, 4)
    if len(boxes) == 0:
        raise UserError(f"reference {path}: the detector found no subject, expected exactly one")
    if len(boxes) > 1:
        raise UserError(
            f"reference {path}: the detector found {len(boxes)} subjects, expected exactly one; "
            "crop the picture to the one that is meant"
        )
    box = boxes[0]
    side = float(min(box[2] - box[0], box[3] - box[1]))
    if side < policy.smallest_side:
        raise UserError(
            f"reference {path}: the subject is {side:.0f} pixels wide, "
            f"expected at least {policy.smallest_side}"
        )
    if policy.align is not None:
        aligned = np.clip(policy.align(pixels, box), 0.0, 1.0)
        return Image.fromarray(np.uint8(aligned * 255.0 + 0.5))
    width, height = image.size
    grown = float(max(box[2] - box[0], box[3] - box[1])) * (1.0 + policy.margin)
    square = min(round(grown), width, height)
    left = min(max(round(float(box[0] + box[2] - square) / 2.0), 0), width - square)
    top = min(max(round(float(box[1] + box[3] - square) / 2.0), 0), height - square)
    return image.crop((left, top, left + square, top + square))
