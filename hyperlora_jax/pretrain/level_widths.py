"""Widths of a pyramid for pictures of another size than its config was written for."""

from collections.abc import Sequence

import numpy as np

from hyperlora_jax.errors import UserError


def level_widths(widths: Sequence[int], size: int, smallest: int, multiple: int = 8) -> list[int]:
    """Channels of every level from `size` pixels down to `smallest`, each level half the last.

    A list of the right length is taken as it is. Otherwise its first and last widths stay, and the
    levels between grow geometrically, in multiples of `multiple` (the groups of a norm).

    Raises:
        UserError: `size` is not `smallest` times a power of two.
    """
    levels = int(np.log2(size / smallest)) + 1 if size >= smallest else 0
    if levels < 1 or smallest << (levels - 1) != size:
        raise UserError(f"data.size: found {size} pixels, expected {smallest} times a power of two")
    if levels == len(widths):
        return list(widths)
    between = np.geomspace(widths[0], widths[-1], levels)
    return [max(multiple, multiple * round(width / multiple)) for width in between]
