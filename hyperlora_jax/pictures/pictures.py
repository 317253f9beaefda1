"""Pictures as files, as encoded bytes and as arrays. This is the only reader of pictures: training,
`generate`, `refine` and `evaluate` see the same pixels of the same file.

Policy: EXIF orientation is applied, what is transparent becomes white, several frames mean the
first one, more than 8 bits are scaled to 8. A size is cut about the centre and resampled once:
whole blocks of pixels are averaged, so that drawn pixels stay crisp, everything else is Lanczos.

What a condition encoder sees is cut from the picture as it was given, to the encoder's own size:

    pixels = reference_pixels("anna/1.jpg", encoder)        # uint8 [s, s, 3]
    pooled, tokens = encoder.encode(pixels[None] / np.float32(255))
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hyperlora_jax.array_types import AnyArray, UInt8
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures.size_buckets import Size

if TYPE_CHECKING:
    from PIL import Image

warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # of broken EXIF blocks
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
SHOWN_SIZE = 192  # pixels on a side, at least, of what people look at
SMALLEST_SIDE = 8  # pixels; below this a file shows no subject
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_UPRIGHT = {  # of EXIF orientations, by Pillow's names
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
# Pictures that are not read: by suffix, and the kinds of HEIC.
UNREAD = {".heic", ".heif", ".hif", ".jxl", ".jp2", ".psd", ".svg", ".cr2", ".cr3", ".nef", ".arw",
          ".dng", ".raf", ".orf", ".rw2"}  # fmt: skip
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")


def encode_png(picture: UInt8[np.ndarray, "h w 3"], compress_level: int = 6) -> bytes:
    """PNG bytes of a picture, lossless; level 1 takes a third of the time of a photo's."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def to_uint8(images: AnyArray) -> UInt8[np.ndarray, "..."]:
    """Pixels in [0, 1] rounded to 8 bits; uint8 as it is."""
    pixels = np.asarray(images)
    if pixels.dtype == np.uint8:
        return pixels
    return (np.clip(pixels.astype(np.float32), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def to_pil(images: AnyArray) -> "list[Image.Image] | Image.Image":
    """Pillow pictures of [b, h, w, 3] in [0, 1] or uint8; of [h, w, 3] the one picture.

    Raises UserError for arrays of another shape.
    """
    from PIL import Image

    if images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise UserError(
            f"pictures: found shape {list(images.shape)}, expected [b, h, w, 3] or [h, w, 3]"
        )
    pixels = to_uint8(images)
    return [*map(Image.fromarray, pixels)] if pixels.ndim == 4 else Image.fromarray(pixels)


def magnified(images: AnyArray) -> UInt8[np.ndarray, "*b h w 3"]:
    """Pictures of a few pixels large enough to be seen: every pixel is repeated until the picture
    has `SHOWN_SIZE` on a side."""
    pixels = to_uint8(images)
    times = max(1, SHOWN_SIZE // min(pixels.shape[-3:-1]))
    return pixels.repeat(times, axis=-3).repeat(times, axis=-2)


def contact_sheet(images: AnyArray, columns: int) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures [b, h, w, 3] side by side on white, `columns` a row, magnified."""
    pixels = magnified(images)
    gap = SHOWN_SIZE // 24
    framed = np.pad(pixels, ((0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    rows = [
        np.concatenate([*framed[start : start + columns]], axis=1)
        for start in range(0, len(framed) // columns * columns, columns)
    ]
    return np.pad(np.concatenate(rows), ((0, gap), (0, gap), (0, 0)), constant_values=255)


def save_images(paths: Sequence[str | Path] | str | Path, images: AnyArray) -> list[Path]:
    """Writes pictures, as `to_pil` takes them, to a path each (PNG, JPEG, …), or to 00.png, 01.png,
    … of a folder; returns the paths. A single path with the suffix of a picture is a file.

    Raises UserError for other numbers of paths, an unknown suffix, a path that cannot be written.
    """
    pictures = to_pil(images)
    pictures = pictures if isinstance(pictures, list) else [pictures]
    if isinstance(paths, str | Path) and Path(paths).suffix.lower() in SUFFIXES:
        paths = [paths]
    elif isinstance(paths, str | Path):
        paths = [Path(paths) / f"{k:02d}.png" for k in range(len(pictures))]
    if len(paths) != len(pictures):
        raise UserError(f"save_images: {len(paths)} paths for {len(pictures)} pictures")
    for path, picture in zip(map(Path, paths), pictures, strict=True):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be written ({error})") from None
    return [*map(Path, paths)]


def decode(
    encoded: bytes, size: int | Size | None = None, name: str = "picture"
) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB pixels of encoded bytes; see the policy above.

    With `size`, (height, width) or one number for both, the centre of that shape is taken and
    resampled to it. Raises UserError naming `name` when the bytes are no picture.
    """
    return _decoded(encoded, size, name, smallest=1)


def load_image(path: str | Path, size: int | Size | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Upright RGB pixels of a picture file, cut to `size` about its centre when given (`decode`).

    Raises UserError naming the file when it is missing, unreadable, no picture, or has fewer than
    `SMALLEST_SIDE` pixels in height or width.
    """
    path = Path(path)
    return _decoded(_read(path), size, str(path), SMALLEST_SIDE)


def reference_pixels(
    source: "str | Path | bytes | Image.Image", encoder: ImageEncoder, name: str = "picture"
) -> UInt8[np.ndarray, "h w 3"]:
    """What a condition encoder sees of a picture: its centre at the encoder's `image_size`, at
    which the encoder resamples nothing any more.

    Args:
        source: a file; or encoded bytes or a Pillow picture, which errors call `name`.
        encoder: an `ImageEncoder`.

    Raises:
        UserError: see `load_image`.
    """
    size = encoder.image_size
    if isinstance(source, bytes):
        return decode(source, size, name)
    if isinstance(source, str | Path):
        return load_image(source, size)
    return of_pillow(source, size, name)


def of_pillow(
    picture: "Image.Image", size: int | Size | None = None, name: str = "picture"
) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of an opened Pillow picture, as `load_image` gives those of a file."""
    try:
        return _cut(_upright(picture, name), size, name, SMALLEST_SIDE)
    except UserError:
        raise
    except Exception as error:  # a lazily read picture can fail in any of Pillow's ways
        raise UserError(f"{name}: the picture cannot be read ({error})") from None


def upright_size(source: str | Path | bytes, name: str = "picture") -> Size:
    """(height, width) of a picture file, or of encoded bytes, as it is to be looked at; its pixels
    are not decoded.

    Raises UserError as `load_image` does; it calls bytes `name`.
    """
    from PIL import Image, UnidentifiedImageError

    encoded = source if isinstance(source, bytes) else _read(Path(source))
    name = name if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            turned = _orientation(opened) in SIDEWAYS
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except UnidentifiedImageError:
        raise _no_picture(encoded, name) from None
    except Exception as error:  # broken files fail in any of Pillow's ways
        raise UserError(f"{name}: the picture cannot be read ({error})") from None


def _decoded(
    encoded: bytes, size: int | Size | None, name: str, smallest: int
) -> UInt8[np.ndarray, "h w 3"]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            return _cut(_upright(opened, name), size, name, smallest)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise _no_picture(encoded, name) from None
    except Exception as error:  # broken files fail with SyntaxError, struct.error, KeyError, …
        raise UserError(f"{name}: the picture cannot be read ({error})") from None


def _upright(opened: "Image.Image", name: str) -> "Image.Image":
    """The first frame in mode RGB, upright, on white."""
    from PIL import Image

    opened.load()
    how = _UPRIGHT.get(_orientation(opened))
    picture = opened if how is None else opened.transpose(Image.Transpose[how])
    if picture.mode[0] in "IF":
        return _of_deep_gray(picture, name)
    if picture.mode != "RGB" or picture.has_transparency_data:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if picture.mode == "RGBA":
        canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(canvas, picture).convert("RGB")
    return picture


def _orientation(opened: "Image.Image") -> int | None:
    """What EXIF says; a broken block says nothing, the pixels may be sound."""
    from PIL import ExifTags

    try:
        return opened.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's SyntaxError, struct.error, …
        return None


def _of_deep_gray(picture: "Image.Image", name: str) -> "Image.Image":
    """Gray of 16 bits ("I;16"), of 32 ("I", which holds 16) or of floats ("F"), as RGB.

    Pillow itself would cut off everything above 255.
    """
    from PIL import Image

    gray = np.asarray(picture)
    most = float(gray.max())
    if not 0 <= float(gray.min()) <= most <= 65535:
        raise UserError(
            f"{name}: found gray values from {gray.min()} to {most} (mode {picture.mode}), "
            "expected 0 to 65535"
        )
    scale = 1 / 257
    if picture.mode == "F" and most <= 255:
        scale = 255.0 if most <= 1 else 1.0
    pixels = np.round(gray.astype(np.float64) * scale).astype(np.uint8)
    transparent = picture.info.get("transparency")  # one gray value, as in the file
    if isinstance(transparent, int):
        pixels = np.where(gray == transparent, np.uint8(255), pixels)
    return Image.fromarray(pixels).convert("RGB")


def _cut(
    picture: "Image.Image", size: int | Size | None, name: str, smallest: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The centre of shape `size`, resampled to it."""
    from PIL import Image

    if min(picture.size) < smallest:
        raise UserError(
            f"{name}: has {picture.width}x{picture.height} pixels, "
            f"expected at least {smallest}x{smallest}"
        )
    if size is None:
        return np.array(picture)
    height, width = (size, size) if isinstance(size, int) else size
    wide = picture.width * height >= picture.height * width
    # Whole pixels, so that the cut itself mixes none.
    shape = (
        (max(1, round(picture.height * width / height)), picture.height)
        if wide
        else (picture.width, max(1, round(picture.width * height / width)))
    )
    left, top = (picture.width - shape[0]) // 2, (picture.height - shape[1]) // 2
    picture = picture.crop((left, top, left + shape[0], top + shape[1]))
    if shape != (width, height):
        # Means of whole blocks are exact; other factors need a filter against aliasing.
        whole = shape[0] % width == 0 and shape[1] % height == 0
        how = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
        picture = picture.resize((width, height), how)
    return np.array(picture)


def _no_picture(encoded: bytes, name: str) -> UserError:
    kind = ""
    if encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIC:
        kind = "a HEIC picture, as phones write them"
    elif encoded.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        kind = "a JPEG XL picture"
    if kind:
        return UserError(f"{name}: {kind}, which is not read; save it as .jpg or .png")
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
