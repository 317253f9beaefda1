"""Bytes that a compiled program sends between devices, by operation and by mesh axis.

Read from the text of the optimised program. Bytes are the results of a collective on one device,
times the trip count of the loops around it. Transfers between slices appear in the program as sends
to the multi-slice runtime; they are booked under the operation that they carry out.
"""

import re
from collections import defaultdict

import numpy as np
from jax.sharding import Mesh

ELEMENT_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8,
}  # fmt: skip
OPERATIONS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
_INSTRUCTION = re.compile(
    r"=\s*(?P<result>.+?)\s(?P<op>" + "|".join(OPERATIONS) + r")(?P<async>-start)?\((?P<rest>.*)"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9](?:fn)?)?)\[([0-9,]*)\]")
_GROUPS = re.compile(r"replica_groups=\{(\{[^=]*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[^=]*?\})\}")

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLEE = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LESS = re.compile(r"compare\([^)]*%([\w.\-]+)\), direction=LT")
_CONSTANT = re.compile(r"%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_CONTEXT = re.compile(r"\bu32\[\]")  # of an asynchronous operation; carries no data
_CHANNEL = re.compile(r"channel_id=(\d+)")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def _array_sizes(text: str) -> list[int]:
    sizes = []
    for kind, dims in _ARRAY.findall(text):
        if kind in ELEMENT_BYTES:
            count = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
            sizes.append(count * ELEMENT_BYTES[kind])
    return sizes


def _groups(rest: str) -> list[list[int]]:
    """The groups of partition numbers that talk to one another."""
    iota = _IOTA.search(rest)
    if iota:
        shape = [int(n) for n in iota[1].split(",")]
        dims = [int(n) for n in iota[2].split(",")]
        numbers = np.arange(np.prod(dims)).reshape(dims)
        if iota[3]:
            numbers = numbers.transpose([int(n) for n in iota[3].split(",")])
        return numbers.reshape(shape).tolist()
    match = _GROUPS.search(rest) or _PAIRS.search(rest)
    if not match:
        return []
    return [[int(n) for n in g.split(",") if n] for g in re.findall(r"\{([0-9,]*)\}", match[1])]


def axes_of(groups: list[list[int]], mesh: Mesh, num_slices: int) -> str:
    """The mesh axes along which the members of a group differ ("data+fsdp"), or "slices".

    Members of different slices meet over the data-centre network, whatever else they differ in.
    """
    shape = tuple(mesh.shape.values())
    varying: set[str] = set()
    total = int(np.prod(shape))
    for group in groups or [list(range(total))]:
        places = np.stack(np.unravel_index([n % total for n in group], shape))
        for name, row in zip(mesh.shape, places, strict=True):
            if len(set(row.tolist())) > 1:
                varying.add(name)
        if num_slices > 1 and len({n * num_slices // total for n in group}) > 1:
            return "slices"
    return "+".join(name for name in mesh.shape if name in varying) or "none"


def _computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation; the entry is called "ENTRY"."""
    blocks: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        match = _HEADER.match(line)
        if match:
            lines = blocks.setdefault("ENTRY" if match["entry"] else match["name"], [])
        elif line.startswith(" "):
            lines.append(line)
    return blocks


def _iterations(line: str, blocks: dict[str, list[str]]) -> int:
    """How often a `while` runs: JAX's scans and XLA's windowed products count up to a constant in
    their condition."""
    condition = _CONDITION.search(line)
    lines = "\n".join(blocks.get(condition[1], ())) if condition else ""
    bound = _LESS.search(lines)
    constants = dict(_CONSTANT.findall(lines))
    return int(constants.get(bound[1], 1)) if bound else 1


def _trip_counts(blocks: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one step; 1 for loops whose count is not known."""
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        if counts.get(name, 0) >= times:
            return
        counts[name] = times
        for line in blocks.get(name, ()):
            inner = times * _iterations(line, blocks) if " while(" in line else times
            for callee in _CALLEE.findall(line):
                visit(callee, inner)

    visit("ENTRY", 1)
    return counts


def _transfer(line: str, mesh: Mesh, num_slices: int) -> tuple[str, str, int] | None:
    """(operation, axes, bytes) of a line that moves data between devices, else None."""
    crossing = _BETWEEN_SLICES.search(line) if " send(" in line else None
    if crossing:
        operation = crossing[1].lower().replace("_", "-")
        return operation, "slices", _array_sizes(line.split(" send(")[0])[0]
    match = _INSTRUCTION.search(line)
    if not match:
        return None
    sizes = _array_sizes(_CONTEXT.sub("", match["result"]))
    if match["async"] and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]  # (operands, results): count the results
    return match["op"], axes_of(_groups(match["rest"]), mesh, num_slices), sum(sizes)


def collective_bytes(program: str, mesh: Mesh, num_slices: int = 1) -> dict[str, dict[str, int]]:
    """{operation: {axes: bytes per device and step}}; operations of one-member groups count 0.

    The compiler may spread one collective over several fusions, all with the same channel: it is
    counted once.
    """
    total: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    blocks = _computations(program)
    times = _trip_counts(blocks)
    channels: set[tuple[str, str]] = set()
    for name, lines in blocks.items():
        for line in lines:
            moved = _transfer(line, mesh, num_slices)
            if moved is None or moved[1] == "none":
                continue
            channel = _CHANNEL.search(line)
            if channel and (moved[0], channel[1]) in channels:
                continue
            if channel:
                channels.add((moved[0], channel[1]))
            total[moved[0]][moved[1]] += moved[2] * times.get(name, 1)
    return {operation: dict(axes) for operation, axes in total.items()}
