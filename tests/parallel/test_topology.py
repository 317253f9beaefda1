import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel.topology import parse, peak_flops


@pytest.mark.parametrize(
    ("name", "chips", "devices", "description"),
    [
        ("v5p-128", 64, 64, "v5p:4x4x4"),
        ("v4-8", 4, 4, "v4:2x2x1"),
        ("v5p-32", 16, 16, "v5p:2x2x4"),
        ("v5p-256", 128, 128, "v5p:4x4x8"),
        ("v5e-16", 16, 16, "v5e:4x4"),
        ("v5litepod-256", 256, 256, "v5e:16x16"),
        ("v6e:2x4", 8, 8, "v6e:2x4"),
        ("tpu7x-8", 8, 16, "tpu7x:2x2x2"),
        ("2xv5e-256", 512, 512, "v5e:16x16"),
    ],
)
def test_names_as_users_know_them(name, chips, devices, description):
    topology = parse(name)
    assert (topology.num_chips, topology.num_devices) == (chips, devices)
    assert topology.description == description


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100-8", "--topology h100-8: expected .SLICESx.CHIP-SIZE with CHIP one of v4, v5e"),
        ("v5e-17", "v5e-17: expected v5e- one of"),
        ("v5p-7", "v5p counts cores, expected an even number"),
        ("v5p:4x4", "v5p is a 3-D torus, got 4x4"),
    ],
)
def test_unknown_slices(name, message):
    with pytest.raises(UserError, match=message):
        parse(name)


def test_peak_of_known_devices():
    assert peak_flops("TPU v5p") == 459e12
    assert peak_flops("cpu") == 0.0
