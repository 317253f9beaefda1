"""The device mesh: axes `data` (batch), `fsdp` (batch and parameters), `tensor` (parameters).

A batch is split over data × fsdp, a parameter over fsdp × tensor (see `sharding.py`). Axis types
are Auto: XLA partitions the step from the shardings of its arguments alone.
"""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from hyperlora_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def resolve_axes(num_devices: int, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Axis sizes with one −1 replaced by what is left of `num_devices`.

    Raises:
      UserError: more than one −1, a size of 0, or sizes whose product is not `num_devices`.
    """
    sizes = [data, fsdp, tensor]
    wanted = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {wanted}: axis sizes must be positive, at most one of them -1")
    if -1 in sizes:
        given = -math.prod(sizes)
        if num_devices % given:
            raise UserError(f"mesh {wanted}: {given} does not divide {num_devices} devices")
        sizes[sizes.index(-1)] = num_devices // given
    if math.prod(sizes) != num_devices:
        raise UserError(
            f"mesh {wanted} needs {math.prod(sizes)} devices, found {num_devices};"
            " give one axis as -1 to take the rest"
        )
    return sizes[0], sizes[1], sizes[2]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh data × fsdp × tensor over `devices` (default: all of them); −1 takes the rest.

    Several TPU slices divide the data axis: only the reduction of gradients crosses between them.
    Within a slice an axis takes whole axes of the torus where it can, parts of them where not.

    Raises:
      UserError: sizes that do not fit the devices, or data no multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_axes(len(devices), data, fsdp, tensor)
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    if shape[0] % slices:
        raise UserError(
            f"mesh data={shape[0]}: expected a multiple of the {slices} slices; fsdp and tensor"
            " stay within a slice"
        )
    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)
