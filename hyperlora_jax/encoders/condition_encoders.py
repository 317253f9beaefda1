"""Condition encoders: what turns reference pictures into embeddings for the hypernetwork.

All of them satisfy one Protocol, `ImageEncoder`; ours is `FlaxImageEncoder`, written by
`save_encoder`. Which file is read by which class, says `named_encoders.py`.

`hash` identifies what decides about the embeddings: the weights, and of foreign encoders what
pictures become first. It is stored with every checkpoint and compared when one is used
(`stored_encoder.py`).
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import AnyArray, Float, Json, JsonDict, Params
from hyperlora_jax.encoders.image_encoder import ConvEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io

OURS, CLIP, ONNX, TRANSFORMERS = ("hyperlora", "clip", "onnx", "transformers")
FORMAT = "hyperlora-image-encoder"
VERSION = 1


@runtime_checkable
class ImageEncoder(Protocol):
    """Pictures -> (pooled embedding, tokens).

    Attributes:
      name: for messages and metadata.
      embedding_dim: width e of the pooled embedding and of every token.
      hash: hex sha256 of what decides about the embeddings.
      image_size: (height, width) in pixels of the pictures that it looks at; `encode` resizes
        others to it.
      num_tokens: tokens n per picture.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def embedding_dim(self) -> int: ...  # noqa: D102

    @property
    def hash(self) -> str: ...  # noqa: D102

    @property
    def image_size(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def num_tokens(self) -> int: ...  # noqa: D102

    def encode(
        self, images: Float[AnyArray, "b h w 3"]
    ) -> tuple[Float[AnyArray, "b e"], Float[AnyArray, "b n e"]]:
        """Encodes pictures in [0, 1] into pooled [b, e] and tokens [b, n, e]."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class FlaxImageEncoder:
    """Our convolutional encoder with its weights. `encode` may be called inside a jit.

    Attributes:
      name: for messages and metadata.
      module: the Linen module.
      params: its float32 parameters, in host memory where they were read.
      facts: what is known of its training (JSON-able).
      hash: hex sha256 of the weights, see `tree_hash`.
      dtype: in which they are saved, so that the hash stays.
      source: the folder that `load_condition_encoder` was given; "" = none.
    """

    name: str
    module: ConvEncoder
    params: Params
    hash: str
    facts: Json = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    source: str = ""

    @property
    def embedding_dim(self) -> int:
        """Width of the pooled embedding and of every token."""
        return self.module.embedding_dim

    @property
    def num_tokens(self) -> int:
        """Tokens per picture."""
        return self.module.num_tokens

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels; other sizes are resized to it."""
        return self.module.image_size, self.module.image_size

    def encode(
        self, images: Float[AnyArray, "b h w 3"]
    ) -> tuple[Float[AnyArray, "b e"], Float[AnyArray, "b n e"]]:
        """Encodes pictures in [0, 1] into pooled [b, e] and tokens [b, n, e]."""
        return _apply(self.module, self._placed, jnp.asarray(images))

    @functools.cached_property
    def _placed(self) -> Params:
        return placed(self.params)


def placed(params: Params) -> Params:
    """An encoder's parameters on the devices, where they are from its first picture on; not before,
    as training holds encoders that have nothing to do any more."""
    with jax.ensure_compile_time_eval():  # `encode` inside a jit
        return jax.device_put(params)


@functools.partial(jax.jit, static_argnames="module")
def _apply(module: ConvEncoder, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cast(tuple[jax.Array, jax.Array], module.apply({"params": params}, images))


def tree_hash(params: Params) -> str:
    """Hex sha256 over names, dtypes, shapes and bytes of all leaves, in name order."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten_names(params).items()):
        value = np.ascontiguousarray(leaf)
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def flatten_names(params: Params) -> dict[str, np.ndarray]:
    """Nested parameters as {"a/b/kernel": array}."""
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def save_encoder(
    path: epath.PathLike,
    module: ConvEncoder,
    params: Params,
    name: str,
    facts: Mapping[str, object] | None = None,
    dtype: str = "float16",
) -> str:
    """Writes config.json and model.safetensors into the folder `path`; returns the hash."""
    config = {"name": name, "module": arguments_of(module), "facts": dict(facts or {})}
    return save_weights(path, FORMAT, config, params, dtype)


def load_encoder(path: epath.PathLike) -> FlaxImageEncoder:
    """Reads what `save_encoder` wrote.

    Raises:
      UserError: no such folder, another kind of folder, or weights that do not fit the config.
    """
    config, params, weights_hash = load_weights(path, FORMAT)
    try:
        kwargs = {**config["module"], "widths": tuple(config["module"]["widths"])}
        module = ConvEncoder(**kwargs)
        check_params(path, module, params)
        return FlaxImageEncoder(
            config["name"], module, params, weights_hash, config["facts"], config["dtype"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"encoder {path}: config.json does not describe one ({error})") from error


def save_weights(
    path: epath.PathLike,
    kind: str,
    config: Mapping[str, object],
    params: Params,
    dtype: str = "float16",
) -> str:
    """Writes a small model as config.json + model.safetensors; returns the hash of the weights.
    Each file appears whole or not at all."""
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {name: np.ascontiguousarray(v, dtype) for name, v in flatten_names(params).items()}
    storage.replaced(folder / "model.safetensors", safetensors_io.encode(flat, {}))
    text = json.dumps({"format": kind, "version": VERSION, **config}, indent=2, sort_keys=True)
    storage.replaced(folder / "config.json", f"{text}\n".encode())
    return tree_hash(flat)


def load_weights(path: epath.PathLike, kind: str) -> tuple[JsonDict, Params, str]:
    """Reads what `save_weights` wrote: (config, with the weights' dtype under "dtype", float32
    parameters, hash of the stored weights)."""
    folder = epath.Path(path)
    config = read_config(folder)
    if config.get("format") != kind or config.get("version") != VERSION:
        raise UserError(
            f"{folder}: found format {config.get('format')!r} version {config.get('version')!r}, "
            f"expected {kind!r} version {VERSION}"
        )
    flat, _ = safetensors_io.read(storage.fetched(folder / "model.safetensors"))
    params = flax.traverse_util.unflatten_dict(
        {name: value.astype(np.float32) for name, value in flat.items()}, sep="/"
    )
    config["dtype"] = str(np.result_type(np.float16, *(value.dtype for value in flat.values())))
    return config, params, tree_hash(flat)


def read_config(folder: epath.Path) -> JsonDict:
    """The folder's config.json; UserError when it is missing or no JSON object."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder}: found no config.json, expected the folder of a model")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: found {type(config).__name__}, expected a JSON object")
    return config


@runtime_checkable
class SquarePictures(Protocol):
    """A Flax network that looks at pictures of `image_size` × `image_size` pixels."""

    @property
    def image_size(self) -> int: ...  # noqa: D102

    def init(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102


def check_params(path: epath.PathLike, module: SquarePictures, params: Params) -> None:
    """Raises UserError unless `params` has exactly the names and shapes that `module` wants."""
    size = module.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    wanted = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), image)["params"]
    flat_wanted = flax.traverse_util.flatten_dict(wanted, sep="/")
    flat = flatten_names(params)
    for name in sorted(set(flat_wanted) ^ set(flat)):
        state = "missing" if name in flat_wanted else "unknown"
        raise UserError(f"{path}: tensor {name} is {state}, the config says otherwise")
    for name, leaf in sorted(flat_wanted.items()):
        if flat[name].shape != leaf.shape:
            raise UserError(
                f"{path}: tensor {name} has shape {flat[name].shape}, expected {leaf.shape}"
            )


def arguments_of(module: ConvEncoder) -> dict[str, object]:
    """The keyword arguments that make this module."""
    names = ("image_size", "widths", "blocks", "embedding_dim", "pool_channels", "groups")
    return {name: getattr(module, name) for name in names}
