"""Draws avatars: options -> SVG -> pixels, in this process or by many, cached on disk.

Worker processes run this module as a program and speak a small protocol: one JSON line of options
in, raw pixel bytes out. So they need no pickling, no `__main__` guard in the caller's script and
no fork of a process that holds an accelerator.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.worlds import avatar_styles

CHUNK = 128  # pictures a worker draws per request
# Styles that modules of this package render, in `draw(options, size)`; a version is raised when the
# pictures change, so that no cache holds old ones.
RENDERED = {"heads": 1, "fonts": 1}
MIN_PICTURES_PER_WORKER = 1000  # below this a process costs more than it saves


@functools.cache
def neutral_options(style: str) -> tuple[tuple[str, str | int], ...]:
    """Options that fix every part: optional ones are left out, others take the first variant."""
    drawn = avatar_styles.definition(style)
    options: dict[str, str | int] = {"seed": "0"}
    for name, component in drawn["components"].items():
        variants = sorted(component.get("variants", {}))
        if variants:
            options[name + "Variant"] = variants[0]
            options[name + "Probability"] = 0 if "probability" in component else 100
    for name, color in drawn.get("colors", {}).items():
        if color.get("values"):
            options[name + "Color"] = color["values"][0]
    return tuple(options.items())


@functools.cache
def _style(style: str):
    from dicebear import Style

    return Style(avatar_styles.definition(style))


def draw(options: dict, style: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """One picture, composed on white; the styles of RENDERED by their modules' `draw`."""
    if style in RENDERED:
        return importlib.import_module(f"hyperlora_jax.worlds.{style}").draw(options, size)
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    svg = Avatar(_style(style), {**options, "size": size}).to_string()
    png = bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    )
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB"))


def draw_many(
    options: Sequence[dict],
    style: str,
    size: int,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures of all options, in order; see `NamedViews.render_many`."""
    shape = (len(options), size, size, 3)
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), len(options) // MIN_PICTURES_PER_WORKER)
    if cache_dir is None:
        out = np.empty(shape, np.uint8)
        _fill(out, options, style, num_workers, progress)
        return out
    target = Path(cache_dir) / f"avatars-{_content_hash(options, style, size)}.npy"
    if not target.exists():
        _write_cache(target, shape, options, style, num_workers, progress)
    cached = np.load(target, mmap_mode="r")
    if cached.shape != shape:
        raise UserError(f"{target}: found pictures {cached.shape}, expected {shape}; delete it")
    return cached


def _write_cache(target, shape, options, style, num_workers, progress) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot write the avatar cache ({error})") from None
    try:
        _fill(out, options, style, num_workers, progress)
        out.flush()
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _content_hash(options: Sequence[dict], style: str, size: int) -> str:
    drawn_by = RENDERED.get(style) or avatar_styles.definition(style)
    digest = hashlib.sha256(json.dumps([style, size, drawn_by]).encode())
    for option in options:
        digest.update(json.dumps(option, sort_keys=True).encode())
    return digest.hexdigest()[:24]


def _fill(out: np.ndarray, options, style: str, num_workers: int, progress: bool) -> None:
    """Draw into `out`: here, or chunk by chunk in `num_workers` processes."""
    from tqdm import tqdm

    starts = iter(range(0, len(options), CHUNK))
    lock = threading.Lock()
    failures: list[BaseException] = []

    def serve(bar, draw_chunk) -> None:
        try:
            while not failures:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                chunk = options[start : start + CHUNK]
                out[start : start + len(chunk)] = draw_chunk(chunk)
                with lock:
                    bar.update(len(chunk))
        except BaseException as error:
            failures.append(error)

    with tqdm(total=len(options), desc=f"drawing {style}", disable=not progress) as bar:
        if num_workers < 2:
            serve(bar, lambda chunk: np.stack([draw(o, style, out.shape[1]) for o in chunk]))
        else:
            with contextlib.ExitStack() as stack:
                workers = [
                    stack.enter_context(_Worker(style, out.shape[1])) for _ in range(num_workers)
                ]
                threads = [threading.Thread(target=serve, args=(bar, w.draw)) for w in workers]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    if failures:
        raise failures[0]


class _Worker:
    """A process that draws chunks of options."""

    def __init__(self, style: str, size: int):
        self.size = size
        command = [sys.executable, "-m", "hyperlora_jax.worlds.avatar_render", style, str(size)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.asked, self.drawn = self.process.stdin, self.process.stdout

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.asked.close()
        self.drawn.close()
        self.process.wait()

    def draw(self, chunk: Sequence[dict]) -> np.ndarray:
        self.asked.write(json.dumps(list(chunk)).encode() + b"\n")
        self.asked.flush()
        shape = (len(chunk), self.size, self.size, 3)
        wanted = int(np.prod(shape))
        pixels = self.drawn.read(wanted)
        if len(pixels) != wanted:
            raise RuntimeError(f"avatar worker sent {len(pixels)} bytes, expected {wanted}")
        return np.frombuffer(pixels, np.uint8).reshape(shape)


def _serve_requests(style: str, size: int) -> None:
    for line in sys.stdin.buffer:
        for options in json.loads(line):
            sys.stdout.buffer.write(draw(options, style, size).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve_requests(sys.argv[1], int(sys.argv[2]))
