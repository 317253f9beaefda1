import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import size_buckets


@pytest.mark.parametrize(("size", "multiple"), [(16, 4), (512, 64), (768, 64), (1024, 8)])
def test_buckets_keep_the_area_and_are_multiples(size, multiple):
    buckets = size_buckets.of_one_area(size, multiple)
    assert buckets[0] == (size, size) and len(set(buckets)) == len(buckets) > 2
    assert {(w, h) for h, w in buckets} == set(buckets)
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert height * width <= size**2 < (max(height, width) + multiple) * min(height, width)
        assert max(height, width) <= 2 * min(height, width)


def test_the_nearest_bucket_is_that_of_the_median_aspect():
    buckets = size_buckets.of_one_area(512, 64)
    assert size_buckets.nearest([(100, 100)], buckets) == (512, 512)
    assert size_buckets.nearest([(900, 600), (600, 900), (1500, 1000)], buckets) == (640, 384)
    assert size_buckets.nearest([(10, 90)], buckets) == (384, 640)
    assert size_buckets.nearest([(10, 90)], size_buckets.square(8)) == (8, 8)


def test_a_size_that_the_base_cannot_work_on():
    with pytest.raises(UserError, match="got 500 pixels, expected a multiple of 64"):
        size_buckets.of_one_area(500, 64)
