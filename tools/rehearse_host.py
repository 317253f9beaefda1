"""One host of `tools/rehearse.py`: `hyperlora train` on pictures that are drawn when asked for,
watched from inside.

    python tools/rehearse_host.py '{"report": FILE, …}' train --config …

Two things are not the program's own. The listing of a folder is a list of drawn subjects; and where
the plan says "link", a file of encoded rows that has as many rows as one before is another name of
that one: 60,000 subjects × 8 pictures with CLIP ViT-L tokens would take 250 GB. All else (which
pictures a host encodes, their files, reading, batches, steps, saving, the end) is.
"""

import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.cli.main import main
from hyperlora_jax.pictures.concepts import Concept
from hyperlora_jax.pictures.size_buckets import Size
from hyperlora_jax.subjects import encoding_cache, subject_pictures
from hyperlora_jax.train import loop
from hyperlora_jax.train.hypernetwork import hypernet_data, hypernet_training

VIEWS, BLOCKS = 8, 8  # pictures of a subject; blocks of colour in a row of a picture
SAMPLE_SECONDS, WRITE_SECONDS = 0.05, 1.0


class Watch:
    """What this host holds and waits for, phase by phase, in a file that is written anew.

    Args:
        report: the file.
        kill_at: step after whose dispatch this host is sent SIGTERM; 0: never.
    """

    def __init__(self, report: Path, kill_at: int):
        self._report, self._kill_at = report, kill_at
        self.facts: dict[str, Any] = {
            "phase": "start", "step": 0, "data_wait": [], "peaks": {}, "begins": {},
        }  # fmt: skip
        self._lock = threading.Lock()
        threading.Thread(target=self._sample, daemon=True).start()

    def phase(self, name: str) -> None:
        """From now on memory counts to this phase."""
        with self._lock:
            self._note()
            self.facts["phase"] = name
            self.facts["begins"][name] = anonymous()

    def base_is_there(self) -> None:
        """Memory beyond this moment's is what pictures and training take."""
        self.facts.setdefault("base", anonymous())

    def write(self) -> None:
        """The file as things stand."""
        with self._lock:
            self._note()
            written = self._report.with_suffix(".partial")
            written.write_text(json.dumps(self.facts), encoding="utf-8")
            written.replace(self._report)

    def waits(self, batches: Any) -> Any:
        """Batches, with how long each was waited for."""
        return _Waited(batches, self.facts["data_wait"])

    def steps(self, step_fn: Any) -> Any:
        """A train step that tells how far it is and what the trees hold, and is preempted once."""

        def step(state: Any, frozen: Any, batch: Any, key: Any) -> Any:
            first = "bytes" not in self.facts
            if first:
                self.facts["step"] = int(state.step)
                self.facts["bytes"] = held(state, frozen, batch, key)
                self.phase("first step")
            out = step_fn(state, frozen, batch, key)
            if first:
                jax.block_until_ready(out[1])
                self.phase("steps")
            self.facts["step"] += 1
            if self.facts["step"] == self._kill_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return out

        return step

    def _note(self) -> None:
        peaks, phase = self.facts["peaks"], self.facts["phase"]
        peaks[phase] = max(peaks.get(phase, 0), anonymous())

    def _sample(self) -> None:
        written = 0.0
        while True:
            with self._lock:
                self._note()
            if time.monotonic() - written > WRITE_SECONDS:
                self.write()
                written = time.monotonic()
            time.sleep(SAMPLE_SECONDS)


class _Waited:
    def __init__(self, batches: Any, seconds: list[float]):
        self._batches, self._seconds = batches, seconds
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self) -> Any:
        begin = time.perf_counter()
        batch = next(self._batches)
        self._seconds.append(time.perf_counter() - begin)
        return batch


def anonymous() -> int:
    """Bytes of this process that no file stands behind (RssAnon)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


def held(state: Any, frozen: Any, batch: Any, key: Any) -> dict[str, int]:
    """Bytes on this host's first device by tree; "others" is what else lies there."""
    device = jax.local_devices()[0]

    def pieces(tree: Any) -> dict[int, int]:
        """{address: bytes}: arrays can share their memory."""
        shards = (s.data for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards
                  if s.device == device)  # fmt: skip
        return {data.unsafe_buffer_pointer(): data.nbytes for data in shards if data.nbytes}

    trees = {
        "params": pieces(state.params), "average": pieces(state.ema), "frozen": pieces(frozen),
        "optimizer": pieces((state.opt_state, state.step)), "batch": pieces(batch),
    }  # fmt: skip
    known = {part for parts in trees.values() for part in parts}
    known |= set(pieces(jax.random.key_data(key)))
    live = [a for a in jax.live_arrays() if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)]
    others = sum(size for part, size in pieces(live).items() if part not in known)
    return {**{name: sum(parts.values()) for name, parts in trees.items()}, "others": others}


def listed(source: str, buckets: Sequence[Size], count: int, *_: Any) -> list[Concept]:
    """As many drawn subjects as are asked for, in the place of a folder's."""
    del source
    return [_subject(number, buckets[0]) for number in range(count)]


def _subject(number: int, size: Size) -> Concept:
    name = f"{number:06d}"
    letters = "".join(chr(ord("a") + int(digit)) for digit in name)
    look = functools.partial(pictures, number)
    return Concept(
        id=name,
        identity=name,
        captions=(f"a picture of {letters}",) * VIEWS,
        size=size,
        mark=f"drawn {number}",
        load=_no_files,
        pixels=functools.partial(look, size),
        num_references=VIEWS,
        references_at=look,
        other_references=False,
    )


def _no_files() -> Any:
    raise RuntimeError("drawn subjects have no files")


def pictures(number: int, size: Size) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The views of a subject: a colour of its own, rough blocks of every view's own."""
    random = np.random.default_rng(number)
    colour = random.integers(40, 216, 3)
    blocks = np.uint8(colour + random.integers(-40, 40, (VIEWS, BLOCKS, BLOCKS, 3)))
    return [*blocks.repeat(size[0] // BLOCKS, 1).repeat(size[1] // BLOCKS, 2)]


def linking(make: Callable[..., None]) -> Callable[..., None]:
    """`_Part.make` by which files of as many rows become names of the first one."""
    made: dict[tuple[str, int], Path] = {}

    def make_or_link(part: Any, file: Path, subjects: range, batch_size: int) -> None:
        rows = sum(part.counts[subjects.start : subjects.stop])
        first = made.setdefault((part.name, rows), file)
        if first is file:
            make(part, file, subjects, batch_size)
        else:
            file.hardlink_to(first)

    return make_or_link


def around(module: Any, name: str, before: Callable[[], None], after: Callable[[Any], Any]) -> None:
    """Has a module's function preceded by `before`, and give `after` of its result."""
    function = getattr(module, name)

    @functools.wraps(function)
    def told(*arguments: Any, **named: Any) -> Any:
        before()
        return after(function(*arguments, **named))

    setattr(module, name, told)


def run(plan: dict[str, Any], command: list[str]) -> int:
    """The command, watched; its exit code.

    Args:
        plan: "report", "kill_at"; "link": whether files are linked; "only": "encode" or "train",
            after which to end, or "".
    """
    watch = Watch(Path(plan["report"]), plan["kill_at"])

    def nothing(result: Any = None) -> Any:
        return result

    def encoded(result: Any) -> Any:
        watch.phase("start of the loop")
        if plan["only"] == "encode":
            raise SystemExit(0)
        return result

    def trained(result: Any) -> Any:
        watch.phase("end")
        if plan["only"] == "train":
            raise SystemExit(0)
        return result

    subject_pictures.list_concepts = listed
    if plan["link"]:
        encoding_cache._Part.make = linking(encoding_cache._Part.make)
    around(hypernet_data, "load_pictures", watch.base_is_there, nothing)
    around(hypernet_data, "encode_once", lambda: watch.phase("encoding"), encoded)
    around(hypernet_training, "subject_batches", nothing, watch.waits)
    around(hypernet_training, "fit_section", nothing, trained)
    around(loop, "jit_step", nothing, watch.steps)
    try:
        return main(command)
    finally:
        watch.write()


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1]), sys.argv[2:]))
