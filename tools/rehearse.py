"""A run at full size, rehearsed on one machine: what each host holds and waits for.

    python tools/rehearse.py --json docs/measurements/rehearsal_cpu.json
    python tools/rehearse.py --subjects 40 --size tiny          # a minute

`hyperlora train --config configs/sd15.py` through everything but the sizes of the networks:

    preempted    2 processes × 4 simulated devices, from nothing; SIGTERM at step 10
    gone on      1 process × 8 devices, the same workdir, to step 20
    undisturbed  the same from step 0 to 20, on the same encoded pictures (size "tiny" only)
    encoding     all pictures of few and of four times as many subjects, nothing else

Rows of encoded pictures, their files and the batch are the config's with CLIP ViT-L; the base, the
encoder and the hypernetwork are narrow, and pictures are drawn when asked for, at 64 pixels. Of the
files of `--subjects` only the first ones are encoded, the others are further names of them
(`tools/rehearse_host.py`): memory is measured, disks are not. Ends with 1 where a limit is passed.
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GIB, MIB = 2**30, 2**20
KILL_AT, NUM_STEPS = 10, 20
BEFORE = ("start", "encoding", "start of the loop")  # phases before the first step
HYPERNETWORK = {"width": 64, "depth": 1, "num_heads": 2}
UNET = {
    "sample_size": 64, "block_out_channels": [8, 16, 16], "cross_attention_dim": 768,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}  # fmt: skip
TEXT = {
    "hidden_size": 768, "intermediate_size": 64, "num_attention_heads": 12,
    "num_hidden_layers": 0, "max_position_embeddings": 77,
}  # fmt: skip
VAE = {
    "block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "sample_size": 64, "mid_block_add_attention": False,
}  # fmt: skip
CLIP = {"image_size": 224, "patch_size": 14, "projection_dim": 1024, "num_hidden_layers": 1}
# Rows [tokens, width], latents and text states as wide as the config's, or the tests' own.
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "base": {"unet": UNET, "text": TEXT, "vae": VAE}, "clip": CLIP, "encoding": (250, 1000),
        "settings": {}, "undisturbed": False,
    },
    "tiny": {
        "base": {}, "clip": {}, "encoding": (8, 32),
        "settings": {"train.batch_size": 1, "train.encode_batch_size": 64},
        "undisturbed": True,
    },
}  # fmt: skip


def rehearse(folder: Path, subjects: int, size: str) -> dict[str, Any]:
    """All legs; those that a folder has already are not run again."""
    models = _models(folder, size)
    settings = {**SIZES[size]["settings"], **models}
    legs: dict[str, Any] = {}
    for name, hosts, devices, kill_at in (
        ("preempted", 2, 4, KILL_AT), ("gone on", 1, 8, 0), ("undisturbed", 1, 8, 0),
    ):  # fmt: skip
        workdir, only = folder / "run", ""
        if name == "undisturbed":
            if not SIZES[size]["undisturbed"]:
                continue
            workdir, only = folder / "whole", "train"
            workdir.mkdir(exist_ok=True)
            if not (workdir / "encoded").exists():
                (workdir / "encoded").symlink_to(folder / "run" / "encoded")
        plan = {"kill_at": kill_at, "link": True, "only": only}
        own = {**settings, "data.num_identities": subjects}
        legs[name] = _leg(folder, name, workdir, (hosts, devices), plan, own)
    for count in SIZES[size]["encoding"]:
        name, plan = f"encoding {count}", {"kill_at": 0, "link": False, "only": "encode"}
        own = {**settings, "data.num_identities": count}
        legs[name] = _leg(folder, name, folder / name.replace(" ", "-"), (1, 2), plan, own)
    return legs


def _models(folder: Path, size: str) -> dict[str, Path]:
    """Where the narrow base and encoder are."""
    base, clip = folder / "base", folder / "clip"
    if not (folder / "models").exists():
        sys.path.insert(0, str(ROOT))
        from tests import user_world

        user_world.write_base(base, **SIZES[size]["base"])
        user_world.write_clip(clip, **SIZES[size]["clip"])
        (folder / "models").touch()
    return {"base": base, "model.encoder": clip}


def _leg(
    folder: Path,
    name: str,
    workdir: Path,
    shape: tuple[int, int],
    plan: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """{"hosts": reports, "codes", "seconds", "first_step_seconds", "losses"} of some processes."""
    kept = folder / f"{name.replace(' ', '-')}.json"
    if kept.exists():
        print(f"{name}: done before", flush=True)
        return json.loads(kept.read_text())
    begin = time.time()
    hosts, devices = shape
    reports = [folder / f"{kept.stem}-{host}.report" for host in range(hosts)]
    running = [
        _start(reports[host], workdir, plan, settings, environment)
        for host, environment in enumerate(_environments(hosts, devices, folder))
    ]
    try:
        while any(process.poll() is None for process in running):
            _say(name, begin, reports)
            time.sleep(1.0 if sys.stdout.isatty() else 10.0)
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
    rows = _rows(workdir / "events.jsonl")
    first = [row["time"] for row in rows if row["event"] == "compiled" and row["time"] > begin]
    found = {
        "processes": hosts,
        "devices": devices,
        "codes": [process.wait() for process in running],
        "seconds": time.time() - begin,
        "first_step_seconds": first[0] - begin if first else None,
        "losses": [row["loss"] for row in _rows(workdir / "metrics.jsonl")],
        "hosts": [json.loads(report.read_text()) for report in reports],
    }
    print(f"{name}: {found['seconds']:.0f} s, exit codes {found['codes']}", flush=True)
    if found["codes"] != [75 if plan["kill_at"] else 0] * hosts:
        raise SystemExit(f"{name}: ended with {found['codes']}, see {folder}/*.log")
    kept.write_text(json.dumps(found))
    return found


def _start(
    report: Path, workdir: Path, plan: dict, settings: dict, environment: dict[str, str]
) -> subprocess.Popen:
    report.unlink(missing_ok=True)
    every = {
        **settings, "data.source": "drawn", "train.num_steps": NUM_STEPS,
        "train.log_every_steps": 1,
        **{f"model.network.{key}": value for key, value in HYPERNETWORK.items()},
    }  # fmt: skip
    command = [
        *(sys.executable, ROOT / "tools" / "rehearse_host.py"),
        json.dumps({**plan, "report": str(report)}),
        *("train", "--config", ROOT / "configs" / "sd15.py", "--workdir", workdir),
        *(f"--config.{key}={value}" for key, value in every.items()),
    ]
    with report.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*map(str, command)], env=environment, cwd=ROOT, stdout=log, stderr=log
        )


def _environments(hosts: int, devices: int, folder: Path) -> list[dict[str, str]]:
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"  # compiles fast
        f" --xla_force_host_platform_device_count={devices}"
        " --xla_cpu_collective_call_terminate_timeout_seconds=900"
    )
    shared = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "HYPERLORA_CACHE": str(folder / "cache"),
        "XLA_FLAGS": flags,
    }  # fmt: skip
    if hosts == 1:
        return [shared]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    run = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    return [{**shared, **run, "JAX_PROCESS_ID": str(host)} for host in range(hosts)]


def _say(name: str, begin: float, reports: Sequence[Path]) -> None:
    """One line, over the one before, of how far the hosts are."""
    parts = []
    for report in reports:
        if report.exists():
            facts = json.loads(report.read_text())
            most = max(facts["peaks"].values()) / MIB
            parts.append(f"{facts['phase']}, step {facts['step']}, {most:.0f} MiB")
    line = f"{name} {time.time() - begin:.0f} s: {' | '.join(parts)}"
    print(line, end="\033[K\r" if sys.stdout.isatty() else "\n", flush=True)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def summary(legs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per host of every leg: MiB of memory, bytes on a device by tree, seconds."""
    rows = []
    for name, leg in legs.items():
        for number, host in enumerate(leg["hosts"]):
            peaks = host["peaks"]
            waits = host["data_wait"]
            rows.append(
                {
                    "leg": name,
                    "host": number,
                    "base_mib": _mib(host["base"]),
                    "peak_mib": _mib(max(peaks.values())),
                    "beyond_base_mib": _mib(beyond_base(host)),
                    "peaks_mib": {phase: _mib(value) for phase, value in peaks.items()},
                    "device_bytes": host.get("bytes", {}),
                    "data_wait_seconds": [round(seconds, 4) for seconds in waits],
                    "first_step_seconds": _rounded(leg["first_step_seconds"]),
                    "seconds": _rounded(leg["seconds"]),
                }
            )
    return rows


def beyond_base(host: dict[str, Any]) -> int:
    """Bytes that a host holds beyond the base, without what its first step adds: that is the
    compiler's and the simulated devices', which a pod has elsewhere."""
    peaks, begins = host["peaks"], host["begins"]
    before = max(peak for phase, peak in peaks.items() if phase in BEFORE) - host["base"]
    more = [0]
    if "steps" in peaks:
        more.append(peaks["steps"] - peaks["first step"])
    if "end" in peaks:  # some of the first step's memory has been given back by then
        more.append(peaks["end"] - begins["end"])
    return before + max(more)


def _mib(value: float) -> float:
    return round(value / MIB, 1)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def limits(legs: dict[str, Any], most: float, growth: float) -> list[dict[str, Any]]:
    """What was to hold, and whether it does.

    Args:
        most: MiB beyond the base that a host may hold.
        growth: MiB that encoding four times as many subjects may add.
    """
    rows = summary(legs)
    beyond = max(row["beyond_base_mib"] for row in rows)
    few, many = (row["peaks_mib"]["encoding"] for row in rows if row["leg"].startswith("enc"))
    losses = {name: np.asarray(leg["losses"]) for name, leg in legs.items()}
    apart = losses["gone on"]
    found = [
        _limit("beyond the base, MiB", beyond, most),
        _limit("more memory for encoding and opening four times as many, MiB", many - few, growth),
        _limit("step of the last save after SIGTERM", len(losses["preempted"]), NUM_STEPS - 1),
        _limit("steps without a loss", NUM_STEPS - len(apart), 0),
    ]
    if "undisturbed" in legs and len(apart) == NUM_STEPS:
        off = float(np.max(np.abs(apart / losses["undisturbed"] - 1)))
        found.append(_limit("losses gone on against undisturbed", off, 1e-3))
    return found


def _limit(what: str, found: float, most: float) -> dict[str, Any]:
    return {"what": what, "found": round(float(found), 7), "most": most, "holds": found <= most}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        waits = row["data_wait_seconds"][1:] or [0.0]
        lines.append(
            f"{row['leg']:<14} host {row['host']}: RssAnon {row['peak_mib']:.0f} MiB, "
            f"{row['beyond_base_mib']:.0f} beyond the base; "
            + (
                f"first step after {row['first_step_seconds']:.0f} s; data wait a step "
                f"{1000 * np.median(waits):.1f} ms, at most {1000 * max(waits):.1f}"
                if row["first_step_seconds"]
                else f"{row['seconds']:.0f} s"
            )
        )
        if row["device_bytes"]:
            trees = (f"{name} {held / MIB:.2f}" for name, held in row["device_bytes"].items())
            lines.append(f"{'':<14} MiB a device: {', '.join(trees)}")
        lines.append(
            f"{'':<14} MiB by phase: "
            + ", ".join(f"{phase} {peak:.0f}" for phase, peak in row["peaks_mib"].items())
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=60_000)
    parser.add_argument("--size", choices=SIZES, default="full", help="of rows and batches")
    parser.add_argument("--workdir", help="kept, and gone on with; default: a temporary folder")
    parser.add_argument("--limit_gib", type=float, default=2.0, help="beyond the base, per host")
    parser.add_argument(
        "--growth_mib", type=float, default=512.0,
        help="of encoding and opening four times as many: smaller tables are read whole",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.workdir or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        legs = rehearse(folder, given.subjects, given.size)
    rows = summary(legs)
    checks = limits(legs, 1024 * given.limit_gib, given.growth_mib)
    print(_table(rows))
    for check in checks:
        sign = "holds " if check["holds"] else "PASSED"
        print(f"{sign} {check['what']}: {check['found']:.6g} of at most {check['most']:g}")
    if given.json:
        content = {
            "subjects": given.subjects, "size": given.size, "limits": checks, "hosts": rows,
            "losses": {name: leg["losses"] for name, leg in legs.items() if leg["losses"]},
            "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, cpu",
        }  # fmt: skip
        Path(given.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(check["holds"] for check in checks) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts are told too
    sys.exit(main())
