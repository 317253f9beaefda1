"""CLIP's vision encoder as a condition encoder: Flax, from a folder of transformers."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from hyperlora_jax.array_types import AnyArray, Array, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.conditioning import read_config, tree_hash
from hyperlora_jax.hypernet.foreign_encoders import normalisation
from hyperlora_jax.hypernet.image_encoder import resize
from hyperlora_jax.stable_diffusion import directory
from hyperlora_jax.stable_diffusion.checkpoint import param_shapes, torch_to_flax
from hyperlora_jax.stable_diffusion.clip_vision import (
    CLASSES,
    ClipVisionModel,
    vision_model_from_config,
)
from hyperlora_jax.stable_diffusion.tensor_stream import read_tensors, to_devices


@dataclasses.dataclass(frozen=True, eq=False)
class ClipImageEncoder:
    """`encode` may be called inside a jit. Pixels become (pixel - mean) / std."""

    name: str
    module: ClipVisionModel
    params: Params
    hash: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels; other sizes are resized to it."""
        return self.module.image_size, self.module.image_size

    @property
    def num_tokens(self) -> int:
        """Tokens per picture: the class token and one per patch."""
        values = self.module.values
        return 1 + (values["image_size"] // values["patch_size"]) ** 2

    @property
    def embedding_dim(self) -> int:
        """Width of the pooled embedding and of every token."""
        values = self.module.values
        return values["projection_dim" if self.module.has_projection else "hidden_size"]

    def encode(
        self, images: Float[AnyArray, "b h w 3"]
    ) -> tuple[Float[Array, "b e"], Float[Array, "b n e"]]:
        """Encodes pictures in [0, 1] into pooled [b, e] and tokens [b, n, e]."""
        return _apply(self.module, self.mean, self.std, self.params, jnp.asarray(images))


@functools.partial(jax.jit, static_argnames=("module", "mean", "std"))
def _apply(
    module: ClipVisionModel,
    mean: Sequence[float],
    std: Sequence[float],
    params: Params,
    images: Array,
) -> tuple[Array, Array]:
    pixels = (resize(images, module.image_size) - jnp.asarray(mean)) / jnp.asarray(std)
    output = module.apply({"params": params}, pixels)
    return output.pooled, output.tokens


def is_clip_vision(folder: epath.Path) -> bool:
    """Whether config.json names one of transformers' CLIP vision classes."""
    names = read_config(folder).get("architectures") or ()
    return len(names) == 1 and names[0] in CLASSES


def load_clip_vision(path: epath.PathLike) -> ClipImageEncoder:
    """Reads config.json, model.safetensors (or its shards) and preprocessor_config.json.

    Raises:
      UserError: a config that is not supported, or weights that do not fit it.
    """
    folder = Path(path)
    try:
        module = vision_model_from_config(read_config(epath.Path(path)))
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    files = directory.weight_files(folder, "image_encoder")
    shapes = param_shapes(module)
    place = to_devices(shapes, jnp.float32)
    params = torch_to_flax(read_tensors(files), shapes, "image_encoder", str(files[0]), place)
    mean, std = normalisation(epath.Path(path))
    return ClipImageEncoder(folder.name, module, params, tree_hash(params), tuple(mean), tuple(std))
