"""Condition encoders that were trained elsewhere: ONNX files and transformers models.

onnxruntime and torch are imported only when such an encoder is loaded.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from hyperlora_jax.array_types import AnyArray, Float
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.image_encoder import resize

Pooled = Float[AnyArray, "b e"]
Tokens = Float[AnyArray, "b n e"]


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignImageEncoder:
    """An encoder behind a function of normalised NCHW or NHWC pixels.

    Attributes:
      name: for messages and metadata.
      embedding_dim: width of the pooled embedding and of every token.
      hash: hex sha256 of the file with the weights.
      run: normalised pixels -> (pooled [b, e], tokens [b, n, e]) as numpy arrays.
      num_tokens: tokens per picture.
      image_size: (height, width) in pixels that `run` wants; other sizes are resized to it.
      mean, std: pixels become (pixel - mean) / std; one number or one per channel.
      channels_first: whether `run` wants [b, 3, h, w].
    """

    name: str
    embedding_dim: int
    num_tokens: int
    hash: str
    run: Any
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    channels_first: bool

    def encode(self, images: Float[AnyArray, "b h w 3"]) -> tuple[Pooled, Tokens]:
        """Encodes pictures in [0, 1] into pooled [b, e] and tokens [b, n, e]; not traceable."""
        pixels = jnp.asarray(images)
        height, width = self.image_size
        if height == width:
            pixels = resize(pixels, height)
        else:
            pixels = jax.image.resize(pixels, (len(pixels), height, width, 3), "linear")
        normalised = (np.asarray(pixels) - np.float32(self.mean)) / np.float32(self.std)
        if self.channels_first:
            normalised = normalised.transpose(0, 3, 1, 2)
        pooled, tokens = self.run(np.ascontiguousarray(normalised, np.float32))
        return np.float32(pooled), np.float32(tokens)


def load_onnx(
    path: epath.PathLike,
    image_size: int | None = None,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> ForeignImageEncoder:
    """An ONNX model with one image input; its first 2-D output is the embedding.

    A 3-D output [b, n, e] of the same width, if there is one, gives the tokens; else the pooled
    embedding is the only token. The layout (NCHW or NHWC) and size follow from the input's shape.

    Args:
      path: the .onnx file.
      image_size: side in pixels; needed only when the model leaves its input size open.
      mean: subtracted from pixels in [0, 1].
      std: pixels are divided by it afterwards.

    Raises:
      UserError: onnxruntime is not installed, the file is no ONNX model, or its input is no image.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"encoder {path}: needs onnxruntime, install the extra: pip install hyperlora-jax[onnx]"
        ) from error
    data = epath.Path(path).read_bytes()
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise UserError(f"encoder {path}: is no ONNX model that onnxruntime reads") from error
    first_input = session.get_inputs()[0]
    size, channels_first = _image_layout(path, first_input.shape, image_size)

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(first_input.shape[0], int):  # a fixed batch size: one picture at a time
            step = first_input.shape[0]
            parts = [
                session.run(None, {first_input.name: pixels[i : i + step]})
                for i in range(0, len(pixels), step)
            ]
            outputs = [np.concatenate(group) for group in zip(*parts, strict=True)]
        else:
            outputs = session.run(None, {first_input.name: pixels})
        return _pooled_and_tokens(path, outputs)

    probe = np.zeros((1, 3, *size) if channels_first else (1, *size, 3), np.float32)
    _, tokens = run(probe)
    return ForeignImageEncoder(
        epath.Path(path).stem,
        tokens.shape[2],
        tokens.shape[1],
        hashlib.sha256(data).hexdigest(),
        run,
        size,
        mean,
        std,
        channels_first,
    )


def load_transformers(path: epath.PathLike, image_size: int | None = None) -> ForeignImageEncoder:
    """A transformers vision model (ViT, DINOv2, CLIP vision, ...) read from a local folder.

    Pooled is the pooler's output, or else the first token. CLIP's embedding and tokens are
    projected into the space that it shares with texts.

    Raises:
      UserError: torch is not installed or the folder holds no vision model.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"encoder {path}: needs PyTorch, install the extra: pip install hyperlora-jax[torch]"
        ) from error
    try:
        model = transformers.AutoModel.from_pretrained(str(path), use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"encoder {path}: holds no transformers vision model") from error
    projection = getattr(model, "visual_projection", None)  # CLIP: into the space of texts
    model = getattr(model, "vision_model", model)
    if model.main_input_name != "pixel_values":
        raise UserError(
            f"encoder {path}: found a model of {model.main_input_name}, expected a vision model"
        )
    mean, std = normalisation(epath.Path(path))
    size = image_size or getattr(model.config, "image_size", 224)

    def run(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            output = model(pixel_values=torch.from_numpy(pixels))
        tokens = output.last_hidden_state
        if tokens.ndim == 4:  # convolutional models: [b, e, h, w]
            tokens = tokens.flatten(2).transpose(1, 2)
        pooled = output.get("pooler_output")
        pooled = tokens[:, 0] if pooled is None else pooled.flatten(1)
        if projection is not None:
            with torch.no_grad():
                pooled, tokens = projection(pooled), projection(model.post_layernorm(tokens))
        return pooled.numpy(), tokens.numpy()

    _, tokens = run(np.zeros((1, 3, size, size), np.float32))
    from hyperlora_jax.hypernet.conditioning import tree_hash

    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return ForeignImageEncoder(
        epath.Path(path).name,
        tokens.shape[2],
        tokens.shape[1],
        tree_hash(weights),
        run,
        (size, size),
        mean,
        std,
        True,
    )


def _image_layout(
    path: epath.PathLike, shape: Sequence[Any], image_size: int | None
) -> tuple[tuple[int, int], bool]:
    if len(shape) != 4 or (shape[1] != 3 and shape[3] != 3):
        raise UserError(
            f"encoder {path}: input has shape {list(shape)}, expected [b, 3, h, w] or [b, h, w, 3]"
        )
    channels_first = shape[1] == 3
    sides = shape[2:4] if channels_first else shape[1:3]
    if all(isinstance(side, int) for side in sides):
        return (sides[0], sides[1]), channels_first
    if image_size is None:
        raise UserError(f"encoder {path}: leaves its image size open, give image_size")
    return (image_size, image_size), channels_first


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


def normalisation(folder: epath.Path) -> tuple[list[float], list[float]]:
    """(mean, std) of a model folder's preprocessor_config.json; 0.5 and 0.5 without one."""
    import json

    file = folder / "preprocessor_config.json"
    if not file.exists():
        return [0.5], [0.5]
    values = json.loads(file.read_text())
    return list(values.get("image_mean", [0.5])), list(values.get("image_std", [0.5]))
