"""LPIPS: perceptual distance of two pictures by features of an image classifier (arXiv 1801.03924).

With y_k(x) the features of layer k, normalised to length 1 at every place, and w_k >= 0 weights per
channel that people's judgements gave,

    d(x, x') = sum_k mean over places of <w_k, (y_k(x) - y_k(x'))^2>

No weights are shipped. `tools/convert_lpips.py` makes our file from a classifier (AlexNet or VGG16
as torchvision names their tensors) and the heads of the `lpips` package:

    backbone/0/kernel [kh, kw, i, o], backbone/0/bias [o], ...    convolutions in their order
    heads/0 [c], ...                                              one per layer that is looked at
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn

from hyperlora_jax import storage
from hyperlora_jax.array_types import AnyArray, Array, Float
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.subjects.encoded_subjects import encode_in_batches

SMALLEST = 64  # pixels per side that the heads were trained at; smaller pictures are enlarged
BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A classifier's convolutional part.

    Attributes:
        shapes: (kernel side, inputs, outputs) of every convolution.
        stride, padding: of every convolution.
        pool_before: convolutions that a max pooling of side `pool`, stride 2, stands before.
        taps: convolutions whose rectified output is looked at.
    """

    shapes: tuple[tuple[int, int, int], ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    pool_before: tuple[int, ...]
    pool: int
    taps: tuple[int, ...]


def _vgg16() -> Layout:
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    shapes = tuple((3, widths[k], widths[k + 1]) for k in range(13))
    return Layout(shapes, (1,) * 13, (1,) * 13, (2, 4, 7, 10), 2, (1, 3, 6, 9, 12))


LAYOUTS = {
    "alexnet": Layout(
        ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)),
        (4, 1, 1, 1, 1),
        (2, 2, 1, 1, 1),
        (1, 2),
        3,
        (0, 1, 2, 3, 4),
    ),
    "vgg16": _vgg16(),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Lpips:
    """The distance with its weights.

    Attributes:
        name: of the layout.
        weights: by the names at the top of this file, float32.
    """

    name: str
    weights: Mapping[str, AnyArray]

    def distance(
        self, first: Float[AnyArray, "*b h w 3"], second: Float[AnyArray, "*b h w 3"]
    ) -> Float[np.ndarray, "*b"]:
        """Distances of pictures in [0, 1] (clipped; what is not finite counts as black)."""
        leading = np.shape(first)[:-3]
        a, b = (_cleaned(images) for images in (first, second))
        distances = encode_in_batches(
            lambda rows: _distance(self.name, self.weights, a[rows], b[rows]),
            np.arange(len(a)),
            BATCH,
        )
        return distances.reshape(leading)


def load_lpips(path: epath.PathLike) -> Lpips:
    """Reads a file of `tools/convert_lpips.py`.

    Raises:
        UserError: no such file, not safetensors, or tensors of neither layout.
    """
    try:
        weights = safetensors_io.read(storage.fetched(path))[0]
    except UserError as error:
        wanted = "expected a .safetensors file made by tools/convert_lpips.py"
        raise UserError(f"lpips {error}; {wanted}") from error
    shapes = {name: value.shape for name, value in weights.items()}
    for name, layout in LAYOUTS.items():
        if shapes == weight_shapes(layout):
            return Lpips(name, {k: np.float32(v) for k, v in weights.items()})
    raise UserError(
        f"lpips {path}: found {len(shapes)} tensors of neither {' nor '.join(LAYOUTS)}, expected a "
        "file made by tools/convert_lpips.py"
    )


def weight_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layout's tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for k, (side, inputs, outputs) in enumerate(layout.shapes):
        shapes[f"backbone/{k}/kernel"] = (side, side, inputs, outputs)
        shapes[f"backbone/{k}/bias"] = (outputs,)
    for k, tap in enumerate(layout.taps):
        shapes[f"heads/{k}"] = (layout.shapes[tap][2],)
    return shapes


@functools.partial(jax.jit, static_argnums=0)
def _distance(
    name: str,
    weights: Mapping[str, Array],
    first: Float[Array, "b h w 3"],
    second: Float[Array, "b h w 3"],
) -> Float[Array, " b"]:
    layout = LAYOUTS[name]
    total = jnp.zeros(len(first))
    pairs = zip(*(_features(layout, weights, x) for x in (first, second)), strict=True)
    for k, (ours, theirs) in enumerate(pairs):
        total += (jnp.square(ours - theirs) @ weights[f"heads/{k}"]).mean(axis=(1, 2))
    return total


def _features(
    layout: Layout, weights: Mapping[str, Array], images: Float[Array, "b h w 3"]
) -> list[Float[Array, "b _ _ _"]]:
    x, features = (images - jnp.asarray(MEAN)) / jnp.asarray(STD), []
    for k, (stride, padding) in enumerate(zip(layout.stride, layout.padding, strict=True)):
        if k in layout.pool_before:
            x = nn.max_pool(x, (layout.pool, layout.pool), (2, 2))
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"backbone/{k}/kernel"],
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = nn.relu(x + weights[f"backbone/{k}/bias"])
        if k in layout.taps:
            features.append(x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10))
    return features


def _cleaned(images: AnyArray) -> Float[np.ndarray, "n h w 3"]:
    """Finite pictures in [0, 1], enlarged by whole factors to at least `SMALLEST` pixels."""
    pixels = np.clip(np.nan_to_num(np.asarray(images, np.float32), posinf=0, neginf=0), 0.0, 1.0)
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    factor = -(-SMALLEST // min(flat.shape[1:3]))
    return flat.repeat(factor, axis=1).repeat(factor, axis=2)
