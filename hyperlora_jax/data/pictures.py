"""Pictures as files, as encoded bytes and as arrays."""

import io
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def encode_png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """PNG bytes of a picture, lossless."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def decode(
    encoded: bytes, size: int | None = None, name: str = "picture"
) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB pixels of encoded bytes, transparent pixels on white.

    With `size` the centre square is taken and resampled to size x size. Raises UserError naming
    `name` when the bytes are no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode not in ("RGB", "RGBA"):
                picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            if picture.mode == "RGBA":
                canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
                picture = Image.alpha_composite(canvas, picture).convert("RGB")
            if size is not None:
                # Whole factors are means of whole blocks; others need a filter against aliasing.
                whole = min(picture.size) % size == 0
                how = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
                picture = ImageOps.fit(picture, (size, size), how)
            return np.array(picture)
    except UnidentifiedImageError:
        found = f"{len(encoded)} bytes that are no picture" if encoded else "an empty file"
        raise UserError(f"{name}: found {found}, expected {', '.join(SUFFIXES)}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: the picture cannot be read ({error})") from None


def load_image(path: str | Path, size: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB pixels of a picture file, centre-cropped to size x size when given.

    Raises UserError naming the file when it is missing, unreadable or no picture.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a picture file")
    try:
        encoded = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture file") from None
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be read ({error.strerror})") from None
    return decode(encoded, size, str(path))
