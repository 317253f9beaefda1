"""`hyperlora compile`: does the training step of a config fit a TPU slice? Needs no TPU."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from hyperlora_jax.array_types import Json
from hyperlora_jax.cli import config_checks
from hyperlora_jax.cli.config import load_config
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from hyperlora_jax.parallel.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, --topology and what to do with them."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="a config of train, or of pretrain with task unet",
    )
    parser.add_argument(
        "--topology",
        metavar="NAMES",
        required=True,
        help="slices, separated by commas: v5p-128, v5e-16, v6e:4x4, 2xv5e-256",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="the largest batch per chip that fits, with the cheapest remat that allows it",
    )
    parser.add_argument("--batch_per_device", type=int, help="instead of the config's batch size")
    parser.add_argument("--effort", choices=("full", "low"), default="full", help="of the compiler")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write one record per topology; records of others that are there already stay",
    )


def run(args: argparse.Namespace) -> int:
    """Compiles for every topology; 0 if the step fits all of them, else 1."""
    from hyperlora_jax.aot import ahead_of_time

    ahead_of_time.prepare_environment()
    from hyperlora_jax.parallel.topology import parse

    config = load_config(args.config, getattr(args, "overrides", ()))
    config_checks.check(config, "compile", args.config)
    topologies = [parse(name) for name in args.topology.split(",") if name.strip()]
    file = Path(args.json) if args.json else None
    if file:
        read_records(file)  # complains before the hours, not after them
    fits = True
    for topology in topologies:
        print(f"compiling for {topology.name} ({topology.num_chips} chips)…", file=sys.stderr)
        record = _compiled(config, topology, args)
        print(as_text(record))
        fits = fits and record["fits"]
        if file:
            write_records(file, [record])
    return 0 if fits else 1


def _compiled(config: ConfigDict, topology: "Topology", args: argparse.Namespace) -> Json:
    from hyperlora_jax.aot import ahead_of_time, workloads

    batch, remat = args.batch_per_device or _config_batch(config, topology), None
    if args.search:
        best = _search(config, topology)
        if best is None:
            asked = {"topology": topology.name, "effort": "low"}
            return {**asked, "fits": False, "reason": "not even batch 1"}
        batch, remat = best["batch_per_chip"] // topology.chip.devices, best["remat"]
    return ahead_of_time.compile_for(
        workloads.config_workload(config, remat),
        topology,
        mesh_axes=dict(config.mesh),
        batch_per_device=batch,
        low_effort=args.effort == "low",
        records=records_folder(),
    )


def read_records(file: Path) -> list[Json]:
    """What `--json` wrote before; none where there is no file.

    Raises:
        UserError: the file holds something else.
    """
    if not file.exists():
        return []
    try:
        records = json.loads(file.read_text())
        if all("topology" in record and "effort" in record for record in records):
            return records
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"--json {file}: found another file, expected records of hyperlora compile")


def write_records(file: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Adds records to a file; one of the same topology at the same effort is replaced."""
    new = {(record["topology"], record["effort"]) for record in records}
    others = [old for old in read_records(file) if (old["topology"], old["effort"]) not in new]
    try:
        file.write_text(json.dumps([*others, *records], indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror}") from error


def records_folder() -> Path:
    """Where records of compilations are kept, beside JAX's own cache of programs: the same program
    for the same slice by the same compiler is not compiled again."""
    from hyperlora_jax.parallel.compilation_cache import default_directory

    return Path(default_directory()).parent / "compiled"


def _search(config: ConfigDict, topology: "Topology") -> Json | None:
    """The record of the largest batch that fits, at low effort: on four chips, unless parameters
    are spread over more."""
    from hyperlora_jax.aot import compile_search, workloads

    spread = config.mesh.fsdp != 1 or config.mesh.tensor != 1
    return compile_search.search(
        [workloads.config_workload(config, name) for name in workloads.REMAT],
        topology if spread else topology.smallest,
        mesh_axes=dict(config.mesh),
        records=records_folder(),
        report=lambda record: print(_trial(record), flush=True),
    )


def _config_batch(config: ConfigDict, topology: "Topology") -> int:
    """Examples per device that the config asks for.

    Raises:
        UserError: it leaves the batch open, or the slice cannot share it out.
    """
    from hyperlora_jax.parallel.mesh import resolve_axes

    size, per_device = config.train.batch_size, config.train.get("batch_per_device", False)
    if size is None:
        raise UserError("--config.train.batch_size: is left open, expected a number")
    if per_device:
        return int(size)
    data, fsdp, _ = resolve_axes(topology.num_devices, **config.mesh)
    if size % (data * fsdp):
        raise UserError(
            f"--config.train.batch_size={size}: cannot be shared out by the {data * fsdp} devices "
            f"of {topology.name} that share a batch; expected a multiple, or --batch_per_device N"
        )
    return size // (data * fsdp)


def _trial(record: Json) -> str:
    fits = "fits" if record["fits"] else "does not fit"
    return (
        f"  {record['topology']}, batch {record['batch_per_chip']} per chip,"
        f" remat {record['remat']}: {fits}"
    )


def as_text(record: Json) -> str:
    """One record as a few lines."""
    if "bytes" not in record:
        return (
            f"{record['topology']}: does NOT fit: {record.get('reason', '')}\n"
            "  try a smaller batch, remat, more fsdp or tensor, or --search"
        )
    size = {name: value / 2**30 for name, value in record["bytes"].items()}
    verdict = "fits" if record["fits"] else "does NOT fit (try a smaller batch, remat or more fsdp)"
    seconds = record["seconds_estimate"]
    lines = [
        f"{record['topology']}: {verdict}; {record['chips']} chips, mesh {record['mesh']},"
        f" batch {record['batch_per_chip']} per chip, remat {record['remat']}",
        f"  memory GiB per device: {size['peak']:.2f} of {size['limit']:.2f} (arguments"
        f" {size['arguments']:.2f}, temporaries {size['temporaries']:.2f})",
        f"  {record['flops_per_chip'] / 1e12:.3g} TFLOP per chip and step, compiled in"
        f" {record['compile_seconds']:.0f} s ({record['effort']} effort)",
        f"  estimate: {record['step_seconds_estimate'] * 1e3:.3g} ms a step (compute"
        f" {seconds['compute'] * 1e3:.3g}, memory {seconds['memory'] * 1e3:.3g}, network"
        f" {seconds['network'] * 1e3:.3g}), MFU at most {record['mfu_estimate']:.0%}",
    ]
    for operation, axes in record["collective_bytes"].items():
        moved = ", ".join(f"{axis} {value / 2**20:.1f} MiB" for axis, value in axes.items())
        lines.append(f"  {operation}: {moved}")
    return "\n".join(lines)
