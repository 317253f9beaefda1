"""Condition encoders that were trained elsewhere: ONNX files and transformers models.

onnxruntime and torch are imported only when such an encoder is loaded.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import AnyArray, Float, Json
from hyperlora_jax.encoders.condition_encoders import ONNX, TRANSFORMERS
from hyperlora_jax.encoders.preprocessing import Preprocessing, Size, of_folder
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files.base_files import weight_files
from hyperlora_jax.stable_diffusion.weights.tensor_stream import read_tensors

if TYPE_CHECKING:
    import torch

Pooled = Float[AnyArray, "b e"]
Tokens = Float[AnyArray, "b n e"]
Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignImageEncoder:
    """An encoder behind a function of normalised NCHW or NHWC pixels.

    Attributes:
      name: for messages and metadata.
      kind: "onnx" or "transformers".
      hash: hex sha256 of the weights and `preprocessing`.
      embedding_dim: width of the pooled embedding and of every token.
      num_tokens: tokens per picture.
      run: normalised pixels -> (pooled [b, e], tokens [b, n, e]) as numpy arrays.
      preprocessing: what pictures become first.
      options: JSON-able arguments with which the reader makes the same of `source` again.
      channels_first: whether `run` wants [b, 3, h, w].
      source: the file or folder that `load_condition_encoder` was given.
      module: the PyTorch module behind `run`, of kind "transformers".
    """

    name: str
    kind: str
    hash: str
    embedding_dim: int
    num_tokens: int
    run: Run
    preprocessing: Preprocessing
    options: Json
    channels_first: bool = True
    source: str = ""
    module: "torch.nn.Module | None" = None

    @property
    def image_size(self) -> Size:
        """(height, width) in pixels; other sizes are resized to it."""
        return self.preprocessing.image_size

    def encode(self, images: Float[AnyArray, "b h w 3"]) -> tuple[Pooled, Tokens]:
        """Encodes pictures in [0, 1] into pooled [b, e] and tokens [b, n, e]; not traceable."""
        pixels = np.asarray(self.preprocessing(images), np.float32)
        if self.channels_first:
            pixels = pixels.transpose(0, 3, 1, 2)
        pooled, tokens = self.run(np.ascontiguousarray(pixels))
        return np.asarray(pooled, np.float32), np.asarray(tokens, np.float32)


def load_onnx(path: epath.PathLike, **options: Any) -> ForeignImageEncoder:
    """An ONNX model with one image input; its first 2-D output is the embedding.

    A 3-D output [b, n, e] of the same width, if there is one, gives the tokens; else the pooled
    embedding is the only token. The layout (NCHW or NHWC) and size follow from the input's shape.

    Args:
      path: the .onnx file.
      **options: mean, std and, where the model leaves its input size open, image_size; what a
        preprocessor_config.json beside the file says where not given, else 0.5; as
        `preprocessing.checked_options` returns them.

    Raises:
      UserError: onnxruntime is not installed, the file is no ONNX model, its input is no image or
        none of this size.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"encoder {path}: needs onnxruntime, install the extra: pip install hyperlora-jax[onnx]"
        ) from error
    data = epath.Path(path).read_bytes()
    beside = of_folder(epath.Path(path).parent)
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise UserError(f"encoder {path}: is no ONNX model that onnxruntime reads") from error
    first_input = session.get_inputs()[0]
    size, channels_first, is_open = _image_layout(
        path, first_input.shape, options.get("image_size"), beside.get("image_size")
    )

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(first_input.shape[0], int):  # a fixed batch size: one picture at a time
            step = first_input.shape[0]
            parts = [
                session.run(None, {first_input.name: pixels[i : i + step]})
                for i in range(0, len(pixels), step)
            ]
            outputs = [np.concatenate(group) for group in zip(*parts, strict=True)]
        else:
            outputs = [np.asarray(o) for o in session.run(None, {first_input.name: pixels})]
        return _pooled_and_tokens(path, outputs)

    preprocessing = Preprocessing(**{**beside, **options, "image_size": size})
    weights = hashlib.sha256(data).hexdigest()
    names = ("mean", "std", "image_size") if is_open else ("mean", "std")
    return _probed(
        ForeignImageEncoder(
            epath.Path(path).stem, ONNX, preprocessing.identity(weights), 0, 0, run,
            preprocessing, preprocessing.options(*names), channels_first,
        ),
        path,
    )  # fmt: skip


def load_transformers(path: epath.PathLike, **options: Any) -> ForeignImageEncoder:
    """A transformers vision model (ViT, DINOv2, SigLIP, ...) read from a local folder.

    Pooled is the pooler's output, or else the first token. A relative of CLIP gives both projected
    into the space that it shares with texts.

    Args:
      path: the folder.
      **options: mean, std, image_size; what preprocessor_config.json says where not given, else 0.5
        and the size in the model's config; as `preprocessing.checked_options` returns them.

    Raises:
      UserError: torch is not installed, the folder holds no vision model, or one that does not take
        pictures of this size.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"encoder {path}: needs PyTorch, install the extra: pip install hyperlora-jax[torch]"
        ) from error
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    try:
        bars.disable_progress_bar()  # a folder's few shards: nothing to watch
        model = transformers.AutoModel.from_pretrained(str(path), use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"encoder {path}: holds no transformers vision model") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    projection = getattr(model, "visual_projection", None)
    model = getattr(model, "vision_model", model)
    if model.main_input_name != "pixel_values":
        raise UserError(
            f"encoder {path}: found a model of {model.main_input_name}, expected a vision model"
        )

    class Vision(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.projection = model, projection

        def forward(self, pixels: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
            output = self.model(pixel_values=pixels)
            tokens = output.last_hidden_state
            if tokens.ndim == 4:  # convolutional models: [b, e, h, w]
                tokens = tokens.flatten(2).transpose(1, 2)
            pooled = output.get("pooler_output")
            pooled = tokens[:, 0] if pooled is None else pooled.flatten(1)
            if self.projection is not None:
                tokens = self.model.post_layernorm(tokens)
                pooled, tokens = self.projection(pooled), self.projection(tokens)
            return pooled, tokens

    module = Vision().eval()

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            pooled, tokens = module(torch.from_numpy(pixels))
        return pooled.numpy(), tokens.numpy()

    side = getattr(model.config, "image_size", 224)
    size = {"image_size": tuple(side) if isinstance(side, Sequence) else (side, side)}
    preprocessing = Preprocessing(**{**size, **of_folder(epath.Path(path)), **options})
    return _probed(
        ForeignImageEncoder(
            epath.Path(path).name, TRANSFORMERS,
            preprocessing.identity(_hash_of_files(weight_files(Path(path), "image_encoder"))),
            0, 0, run, preprocessing, preprocessing.options("mean", "std", "image_size"),
            module=module,
        ),
        path,
    )  # fmt: skip


def _hash_of_files(files: Sequence[Path]) -> str:
    """Hex sha256 of the tensors on the disk, so that it needs no PyTorch and outlives versions of
    transformers, which name a model's parts anew."""
    digest = hashlib.sha256()
    for name, load in sorted(read_tensors(files), key=lambda pair: pair[0]):
        value = load()
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _probed(encoder: ForeignImageEncoder, path: epath.PathLike) -> ForeignImageEncoder:
    """The encoder with the shapes of its output, which one grey picture tells.

    Raises:
      UserError: it does not take pictures of its size.
    """
    height, width = encoder.image_size
    try:
        pooled, tokens = encoder.encode(np.full((1, height, width, 3), 0.5, np.float32))
    except UserError:
        raise
    except Exception as error:  # whatever onnxruntime or a model of transformers raises
        raise UserError(
            f"encoder {path}: does not take pictures of {height}x{width} pixels "
            f"({storage.reason(error)}), give another image_size"
        ) from error
    if pooled.shape[1] != tokens.shape[2]:
        raise UserError(
            f"encoder {path}: its embedding has {pooled.shape[1]} numbers, its tokens "
            f"{tokens.shape[2]}; expected one width"
        )
    return dataclasses.replace(encoder, embedding_dim=tokens.shape[2], num_tokens=tokens.shape[1])


def _image_layout(
    path: epath.PathLike,
    shape: Sequence[Any],
    given: Size | None,
    default: Size | None,
) -> tuple[Size, bool, bool]:
    """((height, width), whether channels come first, whether the model leaves its size open)."""
    if len(shape) != 4 or (shape[1] != 3 and shape[3] != 3):
        raise UserError(
            f"encoder {path}: input has shape {list(shape)}, expected [b, 3, h, w] or [b, h, w, 3]"
        )
    channels_first = shape[1] == 3
    sides = shape[2:4] if channels_first else shape[1:3]
    if all(isinstance(side, int) for side in sides):
        size = (sides[0], sides[1])
        if given not in (None, size):
            raise UserError(f"encoder {path}: image_size is {given}, but the model takes {size}")
        return size, channels_first, False
    size = given or default
    if size is None:
        raise UserError(
            f"encoder {path}: leaves its image size open, give image_size "
            "(--config.model.encoder_options.image_size, or a preprocessor_config.json beside it)"
        )
    return size, channels_first, True


def _pooled_and_tokens(
    path: epath.PathLike, outputs: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    pooled = next((o for o in outputs if o.ndim == 2), None)
    if pooled is None:
        raise UserError(
            f"encoder {path}: outputs have shapes {[o.shape for o in outputs]}, expected [b, e]"
        )
    width = pooled.shape[1]
    tokens = next((o for o in outputs if o.ndim == 3 and o.shape[2] == width), pooled[:, None])
    return pooled, tokens
