"""What a command costs from the shell, start-up and all, against another checkout of this project.

    python tools/bench.py shell --against CHECKOUT --json docs/measurements/shell_cpu.json

Whole processes in turns, each build with a cache of its own that one run of every command has
filled. Seconds are of the processor (user and system), which a busy machine changes less than the
time on the clock; the rows "clock" are that.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = 3
SETTINGS = {"data.num_identities": 4, "train.num_steps": 1, "train.batch_size": 2}


def run(device: str = "cpu", against: Path | None = None, runs: int = RUNS) -> list[dict]:
    """All rows. What is measured happens on the host whatever the device is."""
    del device
    builds = {"ours": ROOT} if against is None else {"peer": against, "ours": ROOT}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        commands = _commands(folder)
        found = {(what, name): [] for what in commands for name in builds}
        for number in range(runs + 1):
            for what, command in commands.items():
                for name, code in builds.items():
                    cost = _cost(code, folder / f"cache-{name}", command, folder)
                    if number:  # the first one compiles
                        found[what, name].append(cost)
    return [
        _row(f"shell/{what}{', clock' if kind else ''}", *(
            [cost[kind] for cost in found.get((what, name), ())] for name in ("ours", "peer")
        ))
        for what in commands for kind in (0, 1)
    ]  # fmt: skip


def _commands(folder: Path) -> dict[str, list[str]]:
    """{what it is called: the program's arguments}; makes the files that they read."""
    from PIL import Image

    picture, lora = str(folder / "a.png"), str(folder / "a.safetensors")
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(picture)
    train = ["train", "--config", "avatars", "--workdir", str(folder / "run")]
    train += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    generate = ["generate", "--checkpoint", str(folder / "run"), "--reference", picture]
    generate += ["--out", lora, "--format", "kohya"]
    for command in (train, generate):
        _cost(ROOT, folder / "cache-ours", command, folder)
    drawn = ["sample", "tiny-sd", "--prompt", "x", "--out", str(folder / "drawn")]
    return {
        "--help": ["--help"],
        "train --help": ["train", "--help"],
        "convert --help": ["convert", "--help"],
        "inspect FILE": ["inspect", lora],
        "generate, one picture": generate,
        "sample, one picture": drawn,
    }


def _cost(code: Path, cache: Path, command: list[str], folder: Path) -> tuple[float, float]:
    """(seconds of the processor, seconds on the clock) of one process."""
    environment = {**os.environ, "PYTHONPATH": str(code), "HYPERLORA_CACHE": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(cache / "bytecode")  # as an installed package has it
    log = folder / "log"
    with log.open("w") as file:
        begin, before = time.perf_counter(), os.times()
        done = subprocess.run(
            [sys.executable, "-m", "hyperlora_jax", *command],
            cwd=code, env=environment, stdout=file, stderr=file,
        )  # fmt: skip
        after, end = os.times(), time.perf_counter()
    if done.returncode:
        raise RuntimeError(f"{code}: {' '.join(command)}: {log.read_text()[-500:]}")
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system, end - begin


def _row(workload: str, ours: list[float], peer: list[float]) -> dict:
    ratio = statistics.median(b / a for a, b in zip(ours, peer, strict=True)) if peer else None
    return {
        "workload": workload,
        "ours": round(statistics.median(ours), 3),
        "peer": round(statistics.median(peer), 3) if peer else None,
        "unit": "s",
        "ratio": None if ratio is None else round(ratio, 2),
        "runs": len(ours),
        "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, cpu",
    }
