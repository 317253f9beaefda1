"""Pictures as files, as encoded bytes and as arrays."""

import io
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.data.size_buckets import Size
from hyperlora_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def encode_png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """PNG bytes of a picture, lossless."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def decode(
    encoded: bytes, size: int | Size | None = None, name: str = "picture"
) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB pixels of encoded bytes, transparent pixels on white.

    With `size`, (height, width) or one number for both, the centre of that shape is taken and
    resampled to it. Raises UserError naming `name` when the bytes are no picture.
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
                height, width = (size, size) if isinstance(size, int) else size
                # Whole factors are means of whole blocks; others need a filter against aliasing.
                wide = picture.width * height >= picture.height * width
                whole = (picture.height % height if wide else picture.width % width) == 0
                how = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
                picture = ImageOps.fit(picture, (width, height), how)
            return np.array(picture)
    except UnidentifiedImageError:
        raise _no_picture(encoded, name) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: the picture cannot be read ({error})") from None


def load_image(path: str | Path, size: int | Size | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB pixels of a picture file, cut to `size` about its centre when given (`decode`).

    Raises UserError naming the file when it is missing, unreadable or no picture.
    """
    path = Path(path)
    return decode(_read(path), size, str(path))


def upright_size(path: str | Path) -> Size:
    """(height, width) of a picture file as it is to be looked at; its pixels are not decoded.

    Raises UserError as `load_image` does.
    """
    from PIL import ExifTags, Image, UnidentifiedImageError

    path = Path(path)
    encoded = _read(path)
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except UnidentifiedImageError:
        raise _no_picture(encoded, str(path)) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the picture cannot be read ({error})") from None


def _no_picture(encoded: bytes, name: str) -> UserError:
    found = f"{len(encoded)} bytes that are no picture" if encoded else "an empty file"
    return UserError(f"{name}: found {found}, expected {', '.join(SUFFIXES)}")


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a picture file")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture file") from None
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be read ({error.strerror})") from None
