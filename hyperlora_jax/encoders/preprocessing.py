"""What happens to a picture before a foreign encoder sees it: its size, then (pixel - mean) / std.

A transformers folder says it in preprocessor_config.json, an ONNX file does not; a config's
`model.encoder_options` and the arguments of `load_condition_encoder` override either.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from hyperlora_jax.array_types import AnyArray, Array, Float, Json
from hyperlora_jax.encoders.image_encoder import resize
from hyperlora_jax.errors import UserError

FILE = "preprocessor_config.json"
PROCESSOR = "CLIPImageProcessor"  # which of transformers' classes reads `Preprocessing.to_file`
OPTIONS = ("mean", "std", "image_size")
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Hashable, so that a program can be compiled for it.

    Attributes:
      image_size: (height, width) in pixels.
      mean, std: one number per channel; pixels in [0, 1] become (pixel - mean) / std.
    """

    image_size: Size
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, images: Float[AnyArray, "b h w 3"]) -> Float[Array, "b height width 3"]:
        """Resizes pictures in [0, 1] and normalises them; may be traced."""
        pixels = jnp.asarray(images, jnp.float32)
        height, width = self.image_size
        if height == width:
            pixels = resize(pixels, height)
        else:
            pixels = jax.image.resize(pixels, (len(pixels), height, width, 3), "linear")
        return (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def identity(self, weights: str) -> str:
        """Hex sha256 of an encoder: of the hash of its weights and what its pictures become, for
        both decide about the embeddings."""
        text = json.dumps([weights, self.image_size, self.mean, self.std])
        return hashlib.sha256(text.encode()).hexdigest()

    def options(self, *names: str) -> Json:
        """The named ones of `OPTIONS` as JSON-able values."""
        return {name: list(getattr(self, name)) for name in names}

    def to_file(self) -> str:
        """The same as the content of a transformers folder's preprocessor_config.json."""
        height, width = self.image_size
        size = {"height": height, "width": width}
        values = {"image_mean": self.mean, "image_std": self.std, "size": size, "crop_size": size}
        return json.dumps({"image_processor_type": PROCESSOR, **values}, indent=2) + "\n"


def checked_options(source: epath.PathLike, options: Json) -> Json:
    """Options that are given (not None, not empty): mean and std with three values, image_size as
    (height, width).

    Raises:
      UserError: an unknown option, or one with other values than that.
    """
    checked = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise UserError(f"encoder {source}: unknown option {name!r}, expected one of {OPTIONS}")
        values = tuple(value) if isinstance(value, Sequence) else (value,)
        if value is None or not values:
            continue
        expected = "expected one or two numbers of pixels"
        if name == "image_size":
            good = len(values) <= 2 and all(isinstance(v, int) and v > 0 for v in values)
            values = values * 2 if len(values) == 1 else values
        else:
            expected = "expected one finite number or three" + ", above 0" * (name == "std")
            good = len(values) in (1, 3) and all(
                isinstance(v, int | float) and math.isfinite(v) and (name == "mean" or v > 0)
                for v in values
            )
            values = values * 3 if len(values) == 1 else values
        if not good:
            raise UserError(f"encoder {source}: {name} is {value!r}, {expected}")
        checked[name] = values if name == "image_size" else tuple(map(float, values))
    return checked


def of_folder(folder: epath.Path) -> Json:
    """Options that a model folder's preprocessor_config.json gives; {} without one.

    Raises:
      UserError: it is no JSON object, or its values are none that a picture can be given.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text())
        size = values.get("size")
        if values.get("do_center_crop") and values.get("crop_size"):
            size = values["crop_size"]
        if isinstance(size, dict):
            edge = size.get("shortest_edge")
            size = [size.get("height", edge), size.get("width", edge)]
        options = {
            "mean": values.get("image_mean"),
            "std": values.get("image_std"),
            "image_size": None if size in ([None, None], None) else size,
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: is no JSON object ({error})") from error
    return checked_options(file, options)
