"""From the start of `hyperlora train` to its first step, on LoRAs of weights2weights' size.

    python tools/bench_restart.py --num_loras 20000 --against CHECKOUT --json FILE

A matrix as its user has one (99,648 numbers a row) is imported onto a small base whose q and v at
rank 36 have as many numbers, with one picture per subject. Then configs/w2w_1b.py with a small
network starts afresh, and several times again from its checkpoint; another checkout of this
project (`--against`) does the same on the same dataset in a workdir of its own, in turns. Rows:
seconds to the first step, with the files in the system's memory and without; host memory that no
file stands behind (RssAnon, its highest); and bytes that a run keeps beside the dataset.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NUMBERS, RANK = 99_648, 36
NUM_LORAS, RUNS = 2000, 3
SETTINGS = {
    "model.rank": RANK, "model.network.width": 16, "model.network.depth": 1,
    "model.network.num_heads": 2, "model.network.mlp_ratio": 2, "model.network.scan": False,
    "model.network.remat": False, "model.network.dtype": "float32", "train.batch_size": 8,
    "train.log_every_steps": 1, "mesh.fsdp": 1,
}  # fmt: skip
BATCHES = """
import os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
try:
    from hyperlora_jax.targets.gauged_targets import read_in_gauge
    from hyperlora_jax.targets.lora_targets import open_lora_targets
    from hyperlora_jax.train.hypernetwork.hypernet_data import Rows
except ImportError:  # an older build
    from hyperlora_jax.data.gauged_targets import read_in_gauge
    from hyperlora_jax.data.lora_targets import open_lora_targets
    from hyperlora_jax.train.hypernet_data import Rows
vectors = read_in_gauge(open_lora_targets(sys.argv[1]), "raw", sys.argv[2]).vectors
rows = Rows((vectors,), np.zeros(len(vectors), int), np.arange(len(vectors)))
few = min(len(vectors), 1500)  # stay in the system's memory whatever the number of LoRAs
for start in range(0, few, 32):
    rows[np.arange(start, min(start + 32, few))]
random, count = np.random.default_rng(0), 100
begin = time.perf_counter()
for _ in range(count):
    rows[random.permutation(few)[:32]]
print(32 * count / (time.perf_counter() - begin))
"""


def run(
    device: str = "cpu",
    against: Path | None = None,
    num_loras: int = NUM_LORAS,
    runs: int = RUNS,
    folder: str | None = None,
) -> list[dict]:
    """All rows. What is measured happens on the host whatever the device is."""
    del device
    with tempfile.TemporaryDirectory(dir=folder) as place:
        world = _world(Path(place), num_loras)
        builds = {"ours": ROOT} if against is None else {"peer": against, "ours": ROOT}
        first = {name: _start(world, name, code, 1) for name, code in builds.items()}
        warm: dict[str, list[tuple[float, float]]] = {name: [] for name in builds}
        cold: dict[str, list[tuple[float, float]]] = {name: [] for name in builds}
        for step in range(2, runs + 2):
            for name, code in builds.items():
                warm[name].append(_start(world, name, code, step))
        for step in range(runs + 2, 2 * runs + 2):
            for name, code in builds.items():
                _forget(world)
                cold[name].append(_start(world, name, code, step))
        rates = {name: [] for name in builds}
        for _ in range(runs):
            for name, code in builds.items():
                rates[name].append(_batches(world, name, code))
        kept = {name: _size(world / name / "cache") / 2**20 for name in builds}
        kept["ours"] += _size(world / "targets" / "cache") / 2**20
        size = f"{num_loras} LoRAs of {NUMBERS} numbers"
        values = {
            "start to first step": ("s", {name: [one[0]] for name, one in first.items()}),
            "restart to first step": (
                "s", {name: [one[0] for one in starts] for name, starts in warm.items()},
            ),
            "the same, files not in the system's memory": (
                "s", {name: [one[0] for one in starts] for name, starts in cold.items()},
            ),
            "restart, highest RssAnon": (
                "MiB", {name: [one[1] for one in starts] for name, starts in warm.items()},
            ),
            "kept beside the dataset": ("MiB", {name: [value] for name, value in kept.items()}),
        }  # fmt: skip
        rows = [_row(f"restart/{what}/{size}", *found) for what, found in values.items()]
        rates = _row(f"restart/batches of 32, one core/{size}", "LoRAs/s", rates)
        ratio = None if rates["ratio"] is None else round(1 / rates["ratio"], 2)
        return [*rows, {**rates, "ratio": ratio}]


def _row(workload: str, unit: str, found: dict[str, list[float]]) -> dict:
    ours, peer = found["ours"], found.get("peer")
    ratio = None
    if peer:
        ratio = round(statistics.median(b / a for a, b in zip(ours, peer, strict=True)), 2)
    return {
        "workload": workload,
        "ours": round(statistics.median(ours), 1),
        "peer": None if peer is None else round(statistics.median(peer), 1),
        "unit": unit,
        "ratio": ratio,
        "runs": len(ours),
        "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, cpu",
    }


def _world(place: Path, num_loras: int) -> Path:
    """base/, clip/, people/ and the imported targets/ below `place`."""
    sys.path.insert(0, str(ROOT))
    from PIL import Image

    from tests import user_world

    unet = {"block_out_channels": [64, 128], "cross_attention_dim": 132}
    text = {"hidden_size": 132, "intermediate_size": 132}
    user_world.write_base(place / "base", unet, text)
    user_world.write_clip(place / "clip")
    random = np.random.default_rng(0)
    for k in range(num_loras):
        folder = place / "people" / f"{k:06d}"
        folder.mkdir(parents=True)
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "0.png")
    matrix = place / "matrix.npy"
    rows = np.lib.format.open_memmap(matrix, "w+", np.float32, (num_loras, NUMBERS))
    for row in rows:
        random.standard_normal(out=row, dtype=np.float32)
        row *= 0.01
    rows.flush()
    del rows
    command = ["import", matrix, "--base", place / "base", "--out", place / "targets"]
    _hyperlora(ROOT, place / "compiled", [*command, "--rank", RANK]).communicate()
    matrix.unlink()
    return place


def _hyperlora(code: Path, cache: Path, arguments: list) -> subprocess.Popen:
    environment = {
        **os.environ, "PYTHONPATH": str(code), "HYPERLORA_CACHE": str(cache),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "hyperlora_jax", *map(str, arguments)], cwd=code, env=environment
    )


def _start(world: Path, name: str, code: Path, num_steps: int) -> tuple[float, float]:
    """(seconds to the first step of this start, highest RssAnon in MiB) of a run to `num_steps`."""
    settings = {
        **SETTINGS, "base": world / "base", "data.source": world / "people",
        "data.targets": world / "targets", "data.num_identities": _count(world / "people"),
        "model.encoder": world / "clip", "train.num_steps": num_steps,
    }  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    command = ["train", "--config", "configs/w2w_1b.py", "--workdir", world / name, *overrides]
    begin, highest = time.time(), 0.0
    process = _hyperlora(code, world / f"compiled-{name}", command)
    while process.poll() is None:
        highest = max(highest, _anonymous(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{name}: training ended with {process.returncode}")
    rows = map(json.loads, (world / name / "events.jsonl").read_text().splitlines())
    done = [row["time"] for row in rows if row["event"] == "compiled" and row["step"] == num_steps]
    print(f"{name}: step {num_steps} after {done[-1] - begin:.1f} s, {highest:.0f} MiB", flush=True)
    return done[-1] - begin, highest


def _batches(world: Path, name: str, code: Path) -> float:
    """LoRAs a second of batches of 32 as training gathers them, one core, from warm files."""
    command = [sys.executable, "-c", BATCHES, world / "targets", world / name / "cache"]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    done = subprocess.run(
        [*map(str, command)], cwd=code, env=environment, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def _forget(world: Path) -> None:
    """Takes all files out of the system's memory, as on a host that has just been given out."""
    for path in world.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _anonymous(process: int) -> float:
    """MiB of a process that no file stands behind, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if "RssAnon" in line), 0.0)


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Prints the rows; --json FILE writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another build")
    parser.add_argument("--num_loras", type=int, default=NUM_LORAS)
    parser.add_argument("--runs", type=int, default=RUNS, help="restarts of each build")
    parser.add_argument("--folder", help="for all files: three times the LoRAs' size")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args(arguments)
    rows = run("cpu", given.against, given.num_loras, given.runs, given.folder)
    for row in rows:
        print(f"{row['workload']:<70} {row['ours']:>9} {row['peer'] or '–':>9} {row['unit']} "
              f"× {row['ratio'] or '–'}")  # fmt: skip
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
