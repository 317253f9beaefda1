"""CLIP's vision encoder as a condition encoder: Flax, from and to a folder of transformers.

Of a whole CLIP model (CLIPModel) the vision encoder and its projection are read.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import AnyArray, Array, Float, Json, Params
from hyperlora_jax.encoders.condition_encoders import placed, read_config, tree_hash
from hyperlora_jax.encoders.preprocessing import FILE, Preprocessing, of_folder
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.lora_files.base_files import weight_files
from hyperlora_jax.stable_diffusion.networks.clip_vision import (
    CLASSES,
    ClipVisionModel,
    ClipVisionOutput,
    vision_model_from_config,
)
from hyperlora_jax.stable_diffusion.weights.flax_trees import (
    flax_to_torch,
    param_shapes,
    torch_to_flax,
)
from hyperlora_jax.stable_diffusion.weights.tensor_stream import read_tensors, to_host

WHOLE = "CLIPModel"  # texts too
VISION_PARTS = ("vision_model.", "visual_projection.")
Tensors = Iterable[tuple[str, Callable[[], np.ndarray]]]


@dataclasses.dataclass(frozen=True, eq=False)
class ClipImageEncoder:
    """`encode` may be called inside a jit.

    Attributes:
      name: for messages and metadata.
      module: the Linen module.
      params: its float32 parameters, in host memory where they were read.
      hash: hex sha256 of the weights and `preprocessing`.
      preprocessing: what pictures become first.
      dtype: of the weights in the file: `save_clip_vision` keeps it, nothing is lost.
      source: the folder that `load_condition_encoder` was given.
    """

    name: str
    module: ClipVisionModel
    params: Params
    hash: str
    preprocessing: Preprocessing
    dtype: str
    source: str = ""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels; other sizes are resized to it."""
        return self.preprocessing.image_size

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
        return _apply(self.module, self.preprocessing, self._placed, jnp.asarray(images))

    @functools.cached_property
    def _placed(self) -> Params:
        return placed(self.params)


@functools.partial(jax.jit, static_argnames=("module", "preprocessing"))
def _apply(
    module: ClipVisionModel, preprocessing: Preprocessing, params: Params, images: Array
) -> tuple[Array, Array]:
    output = cast(ClipVisionOutput, module.apply({"params": params}, preprocessing(images)))
    return output.pooled, output.tokens


def is_clip_vision(config: Json) -> bool:
    """Whether a config.json names one of transformers' classes with a CLIP vision encoder."""
    names = config.get("architectures") or ()
    return len(names) == 1 and names[0] in (*CLASSES, WHOLE)


def load_clip_vision(path: epath.PathLike, **options: Any) -> ClipImageEncoder:
    """Reads config.json, model.safetensors (or its shards) and preprocessor_config.json.

    Args:
      path: the folder.
      **options: mean, std, image_size as `preprocessing.checked_options` returns them.

    Raises:
      UserError: a config that is not supported, weights that do not fit it, another image_size
        than that of the position embeddings.
    """
    folder = Path(path)
    config = read_config(epath.Path(path))
    whole = config.get("architectures") == [WHOLE]
    if whole:
        width = config.get("projection_dim", 512)
        config = {**config.get("vision_config", {}), "projection_dim": width}
        config["architectures"] = ["CLIPVisionModelWithProjection"]
    try:
        module = vision_model_from_config(config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    preprocessing = _preprocessing(folder, module, options)
    files = weight_files(folder, "image_encoder")
    tensors: Tensors = read_tensors(files)
    if whole:
        tensors = ((name, load) for name, load in tensors if name.startswith(VISION_PARTS))
    dtypes: list[np.dtype] = []
    shapes = param_shapes(module)
    params = torch_to_flax(
        _noting(tensors, dtypes),
        shapes,
        "image_encoder",
        str(files[0]),
        to_host(shapes, jnp.float32),
    )
    return ClipImageEncoder(
        folder.name,
        module,
        params,
        preprocessing.identity(tree_hash(params)),
        preprocessing,
        str(jnp.result_type(*dtypes)),
    )


def save_clip_vision(path: epath.PathLike, encoder: ClipImageEncoder) -> None:
    """Writes the encoder as a folder that transformers and `load_clip_vision` read, in its own
    dtype, so that its hash stays; every file appears whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    dtype = jnp.dtype(encoder.dtype)
    tensors = {name: leaf.astype(dtype) for name, leaf in flax_to_torch(encoder.params).items()}
    config = json.dumps(json.loads(encoder.module.source), indent=2, sort_keys=True)
    try:
        with storage.writing(path, storage.scratch(path)) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            safetensors_io.write(folder / "model.safetensors", tensors, {"format": "pt"})
            storage.replaced(epath.Path(folder / FILE), encoder.preprocessing.to_file().encode())
            storage.replaced(epath.Path(folder / "config.json"), f"{config}\n".encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({storage.reason(error)})") from error


def _noting(
    tensors: Tensors, dtypes: list[np.dtype]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """The same tensors; the dtypes of those that are loaded are put into the list."""

    def loaded(load: Callable[[], np.ndarray]) -> np.ndarray:
        array = load()
        dtypes.append(array.dtype)
        return array

    for name, load in tensors:
        yield name, functools.partial(loaded, load)


def _preprocessing(
    folder: Path, module: ClipVisionModel, given: Mapping[str, object]
) -> Preprocessing:
    size = (module.image_size, module.image_size)
    if given.get("image_size", size) != size:
        raise UserError(
            f"encoder {folder}: image_size is {given['image_size']}, but its position embeddings "
            f"are for {size}"
        )
    return Preprocessing(**{**of_folder(epath.Path(folder)), **given, "image_size": size})
