"""What training reads: memory of a host and batches per second, here and in another checkout.

    python tools/bench.py data --against ../older_checkout

A set of made-up encoded pictures is written as the checkout keeps it, a process of its own opens it
and takes batches. Memory is what that process has grown by at most since before it opened the set:
its own (RssAnon), and with pages of files that it maps (RssAnon + RssFile).
"""

import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VIEWS, CHUNK = 8, 1024  # pictures of a subject, and of a file
# name: (subjects, tokens, width, latents, dtype, subjects, references and targets of a batch)
SETS = {
    "clip-l/400": (400, 257, 1024, (64, 64, 4), "bfloat16", 16, 1, 1),
    "clip-l/4000": (4000, 257, 1024, (64, 64, 4), "bfloat16", 16, 1, 1),
    "avatars/2048": (2048, 16, 256, (8, 8, 8), "float32", 16, 1, 4),
    # What a chip of a pod takes a step with Stable Diffusion 1.5, its texts with it.
    "clip-l, 8 references, texts/400": (400, 257, 1024, (64, 64, 4), "bfloat16", 16, 8, 1),
}
TEXTS = {"clip-l, 8 references, texts/400": (77, 768)}
# For a checkout that reads all of a set (34 GB), or has texts on the devices.
TOO_LARGE = ("clip-l/4000", *TEXTS)
SECONDS, RUNS = 8.0, 3


def run(against: str | Path | None = None, names: Sequence[str] = tuple(SETS)) -> list[dict]:
    """Rows of every set; peer and ratio are the other checkout's, null without one."""
    rows = []
    for name in names:
        peer = None if against is None or name in TOO_LARGE else Path(against)
        pairs = [
            (_measured(name, ROOT), peer and _measured(name, peer))
            for _ in range(1 if name == "clip-l/4000" else RUNS)
        ]
        rows += [_row(name, key, pairs) for key in WHAT]
    return rows


def _row(name: str, key: str, pairs: list[tuple[dict, dict | None]]) -> dict:
    ours = statistics.median(mine[key] for mine, _ in pairs)
    others = [other[key] for _, other in pairs if other]
    ratios = [mine[key] / other[key] for mine, other in pairs if other]
    if key not in UNITS:
        ratios = [1 / ratio for ratio in ratios]
    return {
        "workload": f"data/training input/{name}/{WHAT[key]}",
        "ours": round(ours, 1),
        "peer": round(statistics.median(others), 1) if others else None,
        "unit": UNITS.get(key, "MiB"),
        "ratio": round(statistics.median(ratios), 2) if ratios else None,
        "runs": len(pairs),
        "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, cpu",
    }


WHAT = {
    "own": "memory of its own",
    "all": "memory with mapped pages",
    "disk": "disk",
    "rate": "batches",
    "core": "batches of one core",
}
UNITS = {"rate": "batches/s", "core": "batches/s of CPU time"}


def _measured(name: str, checkout: Path) -> dict[str, float]:
    """{"own", "all", "disk" in MiB, "rate", "core"} of a set as a checkout keeps it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, name, folder]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{checkout}, {name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, folder: Path) -> dict[str, float]:
    """Writes the set, opens it and takes batches for a while."""
    subjects, tokens, width, latents, dtype, *of_batch = SETS[name]
    try:
        from hyperlora_jax.batches import row_files  # noqa: F401
    except ImportError:
        write, batches_of = _write_arrays, _batches_of_arrays
    else:
        write, batches_of = _write_rows, _batches_of_rows
    kinds = {"pooled": (width,), "tokens": (tokens, width), "latents": latents}
    if name in TEXTS:
        kinds["text_states"] = TEXTS[name]
    random = np.random.default_rng(0)
    block = {
        kind: random.normal(size=(64, *shape)).astype(np.float32) for kind, shape in kinds.items()
    }
    write(folder, block, subjects, dtype)
    del block
    disk = sum(file.stat().st_size for file in folder.iterdir())
    base, most, done = _resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            own, mapped = _resident()
            most[0] = max(most[0], own - base[0])
            most[1] = max(most[1], own + mapped - sum(base))

    watcher = threading.Thread(target=watch)
    watcher.start()
    batches = batches_of(folder, subjects, *of_batch)
    for _ in range(200):  # reads files into the page cache
        next(batches)
    count, start, cpu_start = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < SECONDS:
        next(batches)
        count += 1
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    done.set()
    watcher.join()
    sizes = {"own": most[0] / 2**20, "all": most[1] / 2**20, "disk": disk / 2**20}
    return {**sizes, "rate": count / seconds, "core": count / cpu_seconds}


def _resident() -> tuple[int, int]:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own, mapped = (
        1024 * int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("RssAnon", "RssFile")
    )
    return own, mapped


def _write_rows(folder: Path, block: dict[str, np.ndarray], subjects: int, dtype: str) -> None:
    """As `subjects/encoding_cache.py` does."""
    from hyperlora_jax.lora_files import safetensors_io

    kept = np.dtype(np.float32)
    if dtype == "bfloat16":
        import ml_dtypes

        kept = np.dtype(ml_dtypes.bfloat16)
    kinds = {"conditions": ("pooled", "tokens"), "latents": ("latents",), "texts": ("text_states",)}
    for kind, names in kinds.items():
        if not block.keys() >= {*names}:
            continue
        rows = {name: block[name].astype(kept) for name in names}
        for start in range(0, subjects * VIEWS, CHUNK):
            count = min(CHUNK, subjects * VIEWS - start)
            signature = tuple((name, kept, (count, *rows[name].shape[1:])) for name in names)
            file = folder / f"{kind}-{start:08d}.safetensors"
            with safetensors_io.written_in_rows(file, signature) as put:
                for first in range(0, count, 64):
                    for name in names:
                        put(name, first, rows[name][: count - first])


def _batches_of_rows(
    folder: Path, subjects: int, batch_size: int, num_references: int, num_targets: int
) -> Any:
    from hyperlora_jax.batches import ragged
    from hyperlora_jax.batches.pipelines import subject_batches
    from hyperlora_jax.batches.row_files import RowFiles

    offsets = ragged.offsets_of([VIEWS] * subjects)

    def tables(kind: str) -> dict[str, Any]:
        return RowFiles(sorted(folder.glob(f"{kind}-*"))).tables()

    index = np.arange(subjects * VIEWS, dtype=np.int32)
    targets = {**tables("latents"), "text_index": index}
    if any(folder.glob("texts-*")):
        targets["text_states"] = ragged.Shared(index, tables("texts")["text_states"])
    return subject_batches(
        ragged.Ragged(offsets, tables("conditions")),
        ragged.Ragged(offsets, targets),
        batch_size,
        seed=0,
        num_references=num_references,
        num_targets=num_targets,
    )


def _write_arrays(folder: Path, block: dict[str, np.ndarray], subjects: int, dtype: str) -> None:
    """As it was kept before: float32 arrays of whole subjects, everybody with as many views."""
    del dtype
    for start in range(0, subjects, CHUNK // VIEWS):
        count = min(CHUNK // VIEWS, subjects - start) * VIEWS
        arrays = {
            name: np.resize(rows, (count, *rows.shape[1:])).reshape(-1, VIEWS, *rows.shape[1:])
            for name, rows in block.items()
        }
        np.savez(folder / f"{start:08d}.npz", **arrays)


def _batches_of_arrays(
    folder: Path, subjects: int, batch_size: int, num_references: int, num_targets: int
) -> Any:
    # Where the builds that keep arrays have them.
    encoding_cache = importlib.import_module("hyperlora_jax.data.encoding_cache")
    subject_batches = importlib.import_module("hyperlora_jax.data.pipelines").subject_batches
    chunks = [encoding_cache._read(file) for file in sorted(folder.iterdir())]
    arrays = {name: np.concatenate([chunk.pop(name) for chunk in chunks]) for name in [*chunks[0]]}
    index = np.arange(subjects * VIEWS, dtype=np.int32).reshape(subjects, VIEWS)
    return subject_batches(
        {"pooled": arrays["pooled"], "tokens": arrays["tokens"]},
        {"latents": arrays["latents"], "text_index": index},
        batch_size,
        seed=0,
        num_references=num_references,
        num_targets=num_targets,
    )


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], Path(sys.argv[2]))))
