"""Sizes for pictures that are not square: a few shapes of about one area.

A size is (height, width). One size serves one compiled program, so a concept has one: the bucket
nearest to the median shape of its pictures, which are cut to it about their centres. Cutting
everything to squares is the case of a single bucket.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

from hyperlora_jax.errors import UserError

Size = tuple[int, int]
WIDEST = 2.0  # longest side by shortest; longer pictures are cut


def square(size: int) -> tuple[Size, ...]:
    """The one bucket of centre squares."""
    return ((size, size),)


def of_one_area(size: int, multiple: int) -> tuple[Size, ...]:
    """All sizes of at most size² pixels whose sides are multiples of `multiple`, each as large as
    its shorter side allows; the square first, then by height.

    `multiple` is what a base can work on: the autoencoder's factor times that of its UNet.

    Raises:
        UserError: the square itself is no multiple.
    """
    if size % multiple:
        raise UserError(f"size buckets: got {size} pixels, expected a multiple of {multiple}")
    sides = range(multiple, size, multiple)
    shapes = [(side, size * size // side // multiple * multiple) for side in sides]
    wide = [(short, long) for short, long in shapes if long <= WIDEST * short]
    tall = [(long, short) for short, long in wide]
    return ((size, size), *wide, *reversed(tall))


def nearest(shapes: Iterable[Size], buckets: Sequence[Size]) -> Size:
    """The bucket for pictures of these shapes: least difference of log aspect to their median."""
    aspect = statistics.median(math.log(width / height) for height, width in shapes)
    return min(buckets, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - aspect))
