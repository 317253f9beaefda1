"""The whole demo, as a newcomer runs it, against another checkout of this project.

    python tools/bench.py demo --against CHECKOUT --json docs/measurements/demo_cpu.json

The builds take turns, each run with an empty cache and workdir of its own. What a run cost and
found, its report too, is kept in the system's folder for temporary files under the two builds'
commits: the same command goes on after the last whole run. Memory is that of the process and all it
started, shared pages counted once, looked at every second (Linux).
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS = 1
SECONDS = 1.0  # between two looks at the memory
MIB = 2**20


def run(device: str = "cpu", against: Path | None = None, runs: int = RUNS) -> list[dict]:
    """All rows."""
    builds = {"ours": ROOT} if against is None else {"peer": against, "ours": ROOT}
    place = Path(tempfile.gettempdir()) / "-".join(["bench_demo", *map(_commit, builds.values())])
    place.mkdir(exist_ok=True)
    found: dict[str, list[dict]] = {"ours": [], "peer": []}
    for number in range(runs):
        for name, code in builds.items():
            kept = place / f"{name}-{number}.json"
            if not kept.is_file():
                result = _demo(code, place / f"{name}-{number}")
                kept.write_text(json.dumps(result, indent=1) + "\n")
            found[name].append(json.loads(kept.read_text()))
            print(f"{name} {number}: {found[name][-1]}", file=sys.stderr)
    units = {"total": "s", "peak memory": "MiB", **dict.fromkeys(_scores({}), "share")}
    stages = [name for name in found["ours"][0] if name not in units]
    return [
        _row(name, units.get(name, "s"), device, *(
            [result[name] for result in found[build] if name in result] for build in found
        ))
        for name in (*units, *stages)
    ]  # fmt: skip


def _demo(code: Path, folder: Path) -> dict[str, float]:
    """Scores, seconds of every stage and peak memory of one run."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    folder.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(code), "HYPERLORA_CACHE": str(folder / "cache")
    }  # fmt: skip
    command = [sys.executable, "-m", "hyperlora_jax", "demo", "--workdir", str(folder / "demo")]
    with (folder / "log").open("w") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=code, env=environment, stdout=log, stderr=log)
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, tree_memory(process.pid))
                time.sleep(SECONDS)
        finally:
            process.kill()
        total = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{code}: {' '.join(command)}: {(folder / 'log').read_text()[-500:]}")
    metrics = json.loads((folder / "demo" / "metrics.json").read_text())
    for part in ("cache", "demo/run"):  # the report stays
        shutil.rmtree(folder / part, ignore_errors=True)
    stages = ("distill", "train", "evaluate", "export", "torch", "speed")
    seconds = {name: metrics["seconds"][name] for name in stages}
    return {"total": total, "peak memory": peak / MIB, **_scores(metrics), **seconds}


def _scores(metrics: dict[str, Any]) -> dict[str, float | None]:
    top1, paired = metrics.get("identity_top1", {}), metrics.get("paired", {})
    means = {name: top1.get(name, {}).get("mean") for name in ("generated", "conventional")}
    return {**means, "generated / conventional": paired.get("ratio")}


def tree_memory(pid: int) -> int:
    """Bytes of a process and its descendants; a page that n processes share counts 1/n each."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
        children = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it ended meanwhile
        return total
    return total + sum(tree_memory(int(child)) for line in children for child in line.split())


def _commit(code: Path) -> str:
    command = ["git", "-C", str(code), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _row(name: str, unit: str, device: str, ours: list[float], peer: list[float]) -> dict:
    mine, theirs = statistics.median(ours), statistics.median(peer) if peer else None
    ratio = None if theirs is None else mine / theirs if unit == "share" else theirs / mine
    return {
        "workload": f"demo/{name}",
        "ours": float(f"{mine:.4g}"),
        "peer": None if theirs is None else float(f"{theirs:.4g}"),
        "unit": unit,
        "ratio": None if ratio is None else round(ratio, 3),
        "runs": len(ours),
        "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, {device}",
    }
