"""TPU slices by the names people use, and what a chip can do.

`v5p-128` and `v4-128` count cores (two per chip), as Google's names do; `v5e-256`, `v6e-256` and
`tpu7x-128` count chips; `2xv5e-256` is two slices joined by the data-centre network. Slices of 3-D
tori are given as their chips' most cubic grid, which is what Cloud hands out by default.
"""

import math
import re
from dataclasses import dataclass

from hyperlora_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Figures of one chip: vendor's peak bf16 FLOP/s, memory, bandwidths in bytes per second.

    `memory_gib` is what libtpu's compiler says is available to a program.

    `link_bandwidth` is one chip's total inter-chip bandwidth in one direction over all its links;
    `network_bandwidth` is its share of its host's data-centre network.
    """

    name: str
    peak_flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    dimensions: int  # of the interconnect: 2 or 3
    cores_in_name: int  # how many the name counts per chip
    devices: int  # JAX devices per chip


CHIPS = {
    "v4": Chip("v4", 275e12, 30.75, 1228e9, 300e9, 3.1e9, 3, 2, 1),
    "v5e": Chip("v5e", 197e12, 15.75, 819e9, 200e9, 3.1e9, 2, 1, 1),
    "v5p": Chip("v5p", 459e12, 95.74, 2765e9, 600e9, 6.2e9, 3, 2, 1),
    "v6e": Chip("v6e", 918e12, 31.25, 1640e9, 448e9, 6.2e9, 2, 1, 1),
    "tpu7x": Chip("tpu7x", 2307e12, 189.5, 7380e9, 600e9, 12.5e9, 3, 1, 2),
}
ALIASES = {"v5litepod": "v5e", "v5": "v5p", "7x": "tpu7x", "v7x": "tpu7x"}
GRIDS_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
GRIDS_2D[256] = (16, 16)
DEVICE_KINDS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # two devices a chip
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


@dataclass(frozen=True)
class Topology:
    """A slice, or several equal ones."""

    name: str
    chip: Chip
    grid: tuple[int, ...]
    num_slices: int

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.grid) * self.num_slices

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.num_chips * self.chip.devices

    @property
    def smallest(self) -> "Topology":
        """One host's four chips of the same kind: what a step takes of a chip's memory is found
        there as well, where nothing is spread over more chips."""
        return parse(f"{self.chip.name}-{4 * self.chip.cores_in_name}")

    @property
    def description(self) -> str:
        """The name that libtpu understands, "v5e:16x16"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    @property
    def libtpu_arguments(self) -> dict[str, object]:
        """What libtpu must be told beside the name, for `topologies.get_topology_desc`."""
        arguments: dict[str, object] = {"num_slices": self.num_slices}
        if self.chip.name == "v4":
            arguments["chip_config_name"] = "megacore"  # both cores of a chip as one device
        if math.prod(self.grid) == 1:
            arguments["chips_per_host_bounds"] = [1, 1, 1]  # a host of its own, not of four chips
        return arguments


def peak_flops(device_kind: str) -> float:
    """Peak bf16 FLOP/s of a JAX device by its `device_kind`; 0 if it is not in the table."""
    return DEVICE_KINDS.get(device_kind, 0.0)


def _cubic_grid(chips: int) -> tuple[int, int, int]:
    """a ≤ b with a·b·c = chips, as near to a cube as hosts of 2x2x1 chips allow."""
    grids = [
        (a, b, chips // (a * b))
        for a in range(2, math.isqrt(chips) + 1, 2)
        for b in range(a, chips // a + 1, 2)
        if chips % (a * b) == 0
    ]
    return min(grids, key=lambda grid: (max(grid) - min(grid), grid), default=(1, 1, chips))


def _grid(name: str, chip: Chip, size: str) -> tuple[int, ...]:
    if "x" in size:
        grid = tuple(int(part) for part in size.split("x"))
        if len(grid) != chip.dimensions:
            raise UserError(
                f"--topology {name}: {chip.name} is a {chip.dimensions}-D torus, got {size}"
            )
        return grid
    count = int(size)
    if count % chip.cores_in_name or count == 0:
        raise UserError(f"--topology {name}: {chip.name} counts cores, expected an even number")
    chips = count // chip.cores_in_name
    if chip.dimensions == 3:
        return _cubic_grid(chips)
    if chips not in GRIDS_2D:
        raise UserError(f"--topology {name}: expected {chip.name}- one of {sorted(GRIDS_2D)}")
    return GRIDS_2D[chips]


def parse(name: str) -> Topology:
    """The topology of `v5p-128`, `v5e-16`, `v6e:4x4`, `2xv5e-256`, …

    Raises:
      UserError: no such chip or slice.
    """
    parts = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)[-:](\d+(?:x\d+)*)", name.strip().lower())
    chip = CHIPS.get(ALIASES.get(parts[2], parts[2])) if parts else None
    if parts is None or chip is None:
        raise UserError(
            f"--topology {name}: expected [SLICESx]CHIP-SIZE with CHIP one of {', '.join(CHIPS)},"
            " such as v5p-128, v5e-16, v6e:4x4 or 2xv5e-256"
        )
    return Topology(name.strip(), chip, _grid(name, chip, parts[3]), int(parts[1] or 1))
