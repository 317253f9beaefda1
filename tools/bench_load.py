"""What many visitors of `hyperlora serve` at once get, against one request at a time.

    python tools/bench.py load --json docs/measurements/load_cpu.json

The page of the shipped checkpoint on this machine's loopback; visitors are another process, each
with a session, a picture, a prompt and a seed of its own. A request uploads nothing (the pictures
are there already), writes a LoRA, draws it and the base (two pictures), and writes the three files.
Every visitor asks again as soon as the answer is there. "ours" are pictures a second of so many
visitors, "peer" those of one; the rows "p50" and "p95" are seconds of a request.
"""

import concurrent.futures
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USERS = (1, 8, 32)
REQUESTS = {1: 24, 8: 8, 32: 6}  # of each visitor
PICTURES = 2  # a request


def run(device: str = "cpu") -> list[dict]:
    """All rows; `device` only names the machine."""
    with tempfile.TemporaryDirectory() as place, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "hyperlora_jax", "serve", "--port", str(port)]
        log = Path(place) / "log"
        with log.open("w") as file, subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": place},
        ) as process:  # fmt: skip
            try:
                _until_open(log, process)
                found = {users: _visits(port, users) for users in USERS}
            finally:
                process.terminate()
    rows = []
    alone, seconds_alone = found[1]
    for users, (rate, seconds) in found.items():
        runs = users * REQUESTS[users]
        rows.append(_row(f"load/{users} visitors", rate, alone, "pictures/s", rate / alone, runs))
        for name, place in (("p50", 0.5), ("p95", 0.95)):
            ours, peer = _quantile(seconds, place), _quantile(seconds_alone, place)
            title = f"load/{users} visitors, {name}"
            rows.append(_row(title, ours, peer, "s", peer / ours, runs))
    return [{**row, "machine": f"{row['machine']}, {device}"} for row in rows]


def _until_open(log: Path, process: subprocess.Popen) -> None:
    while not log.read_text().count("all sizes compiled"):
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.2)


def _visits(port: int, users: int) -> tuple[float, list[float]]:
    """(pictures a second, seconds of every request); RuntimeError when one is lost."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradio_client import Client, handle_file

    people = sorted((ROOT / "hyperlora_jax" / "assets" / "example-people").glob("*.png"))
    prompt = "smiling mouth wide eyes no glasses blue striped clothes yellow background"
    clients = [
        Client(f"http://127.0.0.1:{port}/", verbose=False, download_files=False)
        for _ in range(users)
    ]

    def visit(number: int) -> list[float]:
        client, seconds = clients[number], []
        for turn in range(REQUESTS[users]):
            files = [handle_file(str(people[(number + turn) % len(people)]))]
            seed = (31 * number + turn) % 1000
            begin = time.perf_counter()
            status, shown, *_ = client.predict(files, prompt, 1.5, seed, api_name="/draw")
            seconds.append(time.perf_counter() - begin)
            if "Sorry" in status or shown.count("<img") != 3:
                raise RuntimeError(status)
        return seconds

    visit(0)  # opens connections, caches
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(users) as pool:
        seconds = [one for own in pool.map(visit, range(users)) for one in own]
    rate = PICTURES * len(seconds) / (time.perf_counter() - begin)
    for client in clients:
        client.close()
    return rate, seconds


def _quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def _row(
    workload: str, ours: float, peer: float, unit: str, ratio: float, runs: int
) -> dict[str, object]:
    return {
        "workload": workload,
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "unit": unit,
        "ratio": round(ratio, 2),
        "runs": runs,
        "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}",
    }
