"""What many users of `hyperlora serve` at once get, against one request at a time.

    python tools/bench.py load --json docs/measurements/load_cpu.json

The shipped checkpoint on this machine's loopback. Users are one other process that does little but
send and receive, each on a connection of its own, and ask again as soon as the answer is there.
Every request brings a picture that no other one brought, so that its LoRA has to be written.
Workloads: the endpoint for a picture, and for a picture and the base's under a seed of its own; the
page as a browser asks it (upload, then draw: a picture and the base's, and a LoRA kept for
downloads), everybody with a seed of their own, or all with the same one, as the page opens, where
the base's picture is drawn once. "ours" are pictures shown a second with so many users, "peer"
those of one user of the same path, both medians of rounds in turns; the rows "p50" and "p95" are
seconds of a request, "CPU" the server's seconds of CPU a request. A request that is not answered
with pictures ends it all.
"""

import asyncio
import io
import itertools
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USERS = (1, 8, 32)
REQUESTS = {1: 15, 8: 5, 32: 4}  # of each user in a round
ROUNDS = 3  # of 1, 8 and 32 users in turns; what else the machine does meets all of them
PROMPT = "smiling mouth wide eyes no glasses blue striped clothes yellow background"
WORKLOADS = {  # pictures a request
    "endpoint, a picture": 1,
    "endpoint, and the base's": 2,
    "page, own seeds": 2,
    "page, one seed": 2,
}
EDGE = "a-line-between-the-parts-of-a-form"


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
                faces, server = _faces(), process.pid
                rows = [row for name in WORKLOADS for row in _workload(name, port, server, faces)]
            finally:
                process.terminate()
    return [{**row, "machine": f"{row['machine']}, {device}"} for row in rows]


def _until_open(log: Path, process: subprocess.Popen) -> None:
    while not log.read_text().count("all sizes compiled"):
        if process.poll() is not None:
            raise RuntimeError(log.read_text())
        time.sleep(0.2)


def _faces() -> Iterator[bytes]:
    """PNGs of the example people, each changed a little."""
    import numpy as np
    from PIL import Image

    paths = sorted((ROOT / "hyperlora_jax" / "assets" / "example-people").glob("*.png"))
    people = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in paths]
    noise = np.random.default_rng(time.time_ns())
    for person in itertools.cycle(people):
        changed = np.clip(person + noise.integers(-2, 3, person.shape), 0, 255)
        buffer = io.BytesIO()
        Image.fromarray(changed.astype(np.uint8)).save(buffer, "PNG")
        yield buffer.getvalue()


def _workload(name: str, port: int, server: int, faces: Iterator[bytes]) -> list[dict]:
    seeds = iter(random.sample(range(1, 1000), 999))  # the page's slider goes no further
    if name == "page, one seed":
        seeds = itertools.repeat(0)
    rounds: dict[int, list[tuple[float, list[float], float]]] = {users: [] for users in USERS}
    for turn, users in itertools.product(range(ROUNDS + 1), USERS):
        count = REQUESTS[users] if turn else 1  # the first ones fill caches
        given = [[(next(faces), next(seeds)) for _ in range(count)] for _ in range(users)]
        rounds[users].append(asyncio.run(_visits(name, port, server, given)))
    rows, first = [], {}
    for users, (_, *counted) in rounds.items():
        seconds = [one for _, own, _ in counted for one in own]
        runs = len(seconds)
        rate = statistics.median(WORKLOADS[name] * len(own) / took for took, own, _ in counted)
        found = {
            "": (rate, "pictures/s"),
            ", p50": (_quantile(seconds, 0.5), "s"),
            ", p95": (_quantile(seconds, 0.95), "s"),
            ", CPU": (sum(cpu for _, _, cpu in counted) / runs, "s"),
        }
        for what, (ours, unit) in found.items():
            peer = first.setdefault(what, ours)
            ratio = ours / peer if unit != "s" else peer / ours
            title = f"load/{name}, {users} user{'s' * (users > 1)}{what}"
            rows.append(_row(title, ours, peer, unit, ratio, runs))
        print(*(f"{row['workload']}: {row['ours']} {row['unit']}" for row in rows[-4:]), sep="; ")
    return rows


async def _visits(
    name: str, port: int, server: int, given: list[list[tuple[bytes, int]]]
) -> tuple[float, list[float], float]:
    """(seconds of all, seconds of every request, the server's seconds of CPU) of users with a
    picture and a seed for each request."""
    ask = _ask_page if name.startswith("page") else _ask_endpoint

    async def visit(own: list[tuple[bytes, int]]) -> list[float]:
        door, seconds = await asyncio.open_connection("127.0.0.1", port), []
        for picture, seed in own:
            begin = time.perf_counter()
            await ask(door, picture, seed, WORKLOADS[name] == 2)
            seconds.append(time.perf_counter() - begin)
        door[1].close()
        return seconds

    begin, cpu = time.perf_counter(), _cpu(server)
    seconds = await asyncio.gather(*map(visit, given))
    took, cpu = time.perf_counter() - begin, _cpu(server) - cpu
    return took, [one for own in seconds for one in own], cpu


Door = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _ask_endpoint(door: Door, picture: bytes, seed: int, base: bool) -> None:
    fields = {"prompt": PROMPT, "seed": str(seed), "base": str(int(base))}
    found = await _post(door, "/v1/draw", *_form("picture", picture, fields))
    if not found.startswith(b"\x89PNG"):
        raise RuntimeError(found)


async def _ask_page(door: Door, picture: bytes, seed: int, base: bool) -> None:
    found = await _post(door, "/gradio_api/upload", *_form("files", picture, {}))
    file = {"path": json.loads(found)[0], "meta": {"_type": "gradio.FileData"}}
    asked = {"data": [[file], PROMPT, 1.5, seed], "session_hash": str(id(door[1]))}
    found = await _post(
        door, "/gradio_api/run/draw", "application/json", json.dumps(asked).encode()
    )
    if found.count(b"<img") != 3 or found.count(b"'v1/lora/") != 3:
        raise RuntimeError(found)


def _form(name: str, picture: bytes, fields: dict[str, str]) -> tuple[str, bytes]:
    """(content type, body)."""
    part = f'--{EDGE}\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    texts = "".join(part % (key, "") + value + "\r\n" for key, value in fields.items())
    head = texts + part % (name, '; filename="a.png"')
    body = head.encode() + picture + f"\r\n--{EDGE}--\r\n".encode()
    return f"multipart/form-data; boundary={EDGE}", body


async def _post(door: Door, path: str, kind: str, body: bytes) -> bytes:
    """The answer's body; RuntimeError unless it is 200."""
    reader, writer = door
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    [length] = [line for line in lines if line.startswith("content-length:")]
    found = await reader.readexactly(int(length.partition(":")[2]))
    if " 200 " not in lines[0] + " ":
        raise RuntimeError(f"{path}: {lines[0]}: {found[:500]!r}")
    return found


def _cpu(process: int) -> float:
    """Seconds of CPU that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
