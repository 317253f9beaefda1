import jax
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel.mesh import make_mesh, resolve_axes


def test_one_axis_takes_the_rest():
    assert resolve_axes(8, -1, 1, 1) == (8, 1, 1)
    assert resolve_axes(8, 2, -1, 2) == (2, 2, 2)
    assert resolve_axes(8, 1, 1, 8) == (1, 1, 8)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((3, -1, 1), "data=3, fsdp=-1, tensor=1: 3 does not divide 8 devices"),
        ((2, 2, 1), "needs 4 devices, found 8"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 1), "must be positive"),
    ],
)
def test_impossible_axes(axes, message):
    with pytest.raises(UserError, match=message):
        resolve_axes(8, *axes)


def test_mesh_over_chosen_devices():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
