"""One config serves pictures of several sizes."""

import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.pretrain.level_widths import level_widths


def test_a_list_of_the_right_length_is_taken_as_it_is():
    assert level_widths((16, 48), 16, 8) == [16, 48]


def test_more_levels_keep_the_ends_and_the_multiple():
    widths = level_widths((16, 48), 64, 8)
    assert len(widths) == 4 and widths[0] == 16 and widths[-1] == 48
    assert widths == sorted(widths) and all(width % 8 == 0 for width in widths)


def test_one_level_is_no_pyramid():
    assert level_widths((16, 48), 8, 8) == [16]


@pytest.mark.parametrize("size", [4, 24, 17])
def test_sizes_that_do_not_halve_are_refused(size):
    with pytest.raises(UserError, match=f"found {size} pixels, expected 8 times"):
        level_widths((16, 48), size, 8)
