"""LoRAs of pictures, and pictures drawn with them, for many people at once.

    studio = Studio(Hypernetwork.restore("demo/run"), load_base("tiny-sd"))
    subject = studio.write([pixels], seed=0)
    images, base_images = studio.draw(subject, ["smiling"], strength=1.5, seed=0)

Everybody's pictures go into the same batches (`batcher.py`), which are filled up to a few fixed
sizes, so that each size is compiled once. What somebody gets depends on their own pictures, prompt,
strength and seed; the noise is that of `hyperlora sample --seed`. A LoRA of the same pictures and
seed, and the base's picture of a prompt and seed, are made once and remembered for a while.
"""

import contextlib
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, Float, Params, UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.generate import write_each
from hyperlora_jax.hypernet.editing import Directions, edit
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.pictures.pictures import to_uint8
from hyperlora_jax.serve.batcher import Batcher
from hyperlora_jax.stable_diffusion.model import StableDiffusion

T = TypeVar("T")
SUBJECTS = 8  # whose LoRAs are written at once
SIZES = (2, 4, 8, 16, 32)  # pictures that are drawn at once
FULL = 0.75  # of a batch that is drawn; with fewer waiting, a smaller batch is taken
MOST_PICTURES = 4  # that tell one subject


class Subject(NamedTuple):
    """A LoRA as one vector [d], its familiarity (None: unknown) and the seconds it took."""

    vector: Float[np.ndarray, " d"]
    familiarity: float | None
    seconds: float


class _Drawing(NamedTuple):
    vector: np.ndarray
    prompt: str
    strength: float
    amounts: tuple[float, ...]  # of the directions, in their order
    seed: int
    place: int  # of the prompt among those of a request


class Studio:
    """A hypernetwork and its base, at work.

    Args:
        directions: what `edits` may name.
        guidance: None: the base's own.
        sizes: numbers of pictures that are drawn at once.
        most_waiting: pictures that may wait.

    Raises:
        UserError: the hypernetwork belongs to another base.
    """

    def __init__(
        self,
        hyper: Hypernetwork,
        sd: StableDiffusion,
        directions: Directions | None = None,
        *,
        guidance: float | None = None,
        num_steps: int = 20,
        sizes: Sequence[int] = SIZES,
        most_waiting: int = 256,
    ) -> None:
        hyper.check_base(sd, str(sd.path))
        self.hyper, self.sd, self.directions = hyper, sd, directions
        self.names = tuple(directions.vectors) if directions else ()
        self._sampling = {"guidance": guidance, "num_steps": num_steps}
        self._sizes = sorted(sizes)
        self._ready = self._sizes[:1]  # those that are compiled
        self._writing = Batcher(
            self._write, lambda waiting: min(waiting, SUBJECTS), most_waiting=most_waiting
        )
        self._drawing = Batcher(self._draw, self._portion, most_waiting=most_waiting)

    @property
    def batches(self) -> dict[int, int]:
        """How many batches of how many pictures were drawn."""
        return dict(self._drawing.sizes)

    def warm_up(self, wait: bool = False) -> None:
        """Compiles what one picture needs, then, in a thread unless `wait`, all other sizes: until
        then batches are smaller."""
        blank = np.zeros((*self.hyper.encoder.image_size, 3), np.uint8)
        self.draw(self.write([blank], 0), ["-"], 1.0, 0)

        def rest() -> None:
            with contextlib.suppress(UserError):  # somebody ended it all
                for count in range(2, MOST_PICTURES + 1):
                    self.write([blank] * count, 0)
                for size in self._sizes[1:]:
                    self._draw([self._blank("-", 0, 0)] * size)
                    self._ready = [*self._ready, size]
                print("all sizes compiled", flush=True)

        if wait:
            rest()
        else:
            threading.Thread(target=rest, daemon=True, name="warm-up").start()

    def close(self) -> None:
        """Ends the threads."""
        self._writing.close()
        self._drawing.close()

    def write(self, pictures: Sequence[UInt8[np.ndarray, "h w 3"]], seed: int) -> Subject:
        """The LoRA of one subject, from pictures at the encoder's size.

        Raises:
            UserError: see `writing`.
        """
        return self.writing(pictures, seed).result()

    def writing(
        self, pictures: Sequence[UInt8[np.ndarray, "h w 3"]], seed: int
    ) -> "Future[Subject]":
        """`write`, to be waited for.

        Raises:
            UserError: no picture, or more than `MOST_PICTURES`; too many people wait.
        """
        if not 1 <= len(pictures) <= MOST_PICTURES:
            raise UserError(f"found {len(pictures)} pictures, expected 1 to {MOST_PICTURES}")
        stacked = np.stack(pictures)
        key = (hashlib.sha256(stacked.tobytes()).digest(), len(stacked), seed)
        return self._writing.submit([(stacked, seed)], [key])[0]

    def draw(
        self,
        subject: Subject,
        prompts: Sequence[str],
        strength: float,
        seed: int,
        edits: Mapping[str, float] | None = None,
    ) -> tuple[UInt8[np.ndarray, "p h w 3"], UInt8[np.ndarray, "p h w 3"]]:
        """Pictures of the subject, one for each prompt, and what the base draws from the same noise
        without the LoRA.

        Raises:
            UserError: see `drawing`.
        """
        asked = self.drawing(subject, prompts, strength, seed, edits)
        images = np.stack([future.result() for future in asked])
        return images[: len(prompts)], images[len(prompts) :]

    def drawing(
        self,
        subject: Subject,
        prompts: Sequence[str],
        strength: float,
        seed: int,
        edits: Mapping[str, float] | None = None,
        base: bool = True,
    ) -> "list[Future[UInt8[np.ndarray, 'h w 3']]]":
        """`draw`, to be waited for: the subject's pictures, then, unless `base` is False, the
        base's.

        Raises:
            UserError: an edit without a direction; too many people wait.
        """
        amounts = self._amounts(edits or {})
        asked = [
            _Drawing(subject.vector, prompt, strength, amounts, seed, place)
            for place, prompt in enumerate(prompts)
        ]
        keys: list[Hashable] = [None] * len(asked)
        if base:
            asked += [self._blank(prompt, seed, place) for place, prompt in enumerate(prompts)]
            keys += [(prompt, seed, place) for place, prompt in enumerate(prompts)]
        return self._drawing.submit(asked, keys)

    def lora(
        self, subject: Subject, strength: float, edits: Mapping[str, float] | None = None
    ) -> tuple[Params, LoraSpec]:
        """The LoRA that `draw` uses, for a file."""
        lora, spec = self._unflat(subject.vector), None
        chosen = {name: amount for name, amount in (edits or {}).items() if amount}
        if chosen and self.directions is not None:
            lora, spec = edit(lora, self.directions, chosen)
        return factors.scale(lora, strength), spec or self.hyper.spec

    def _amounts(self, edits: Mapping[str, float]) -> tuple[float, ...]:
        if unknown := edits.keys() - set(self.names):
            raise UserError(
                f"edit: no direction {min(unknown)!r}, there are {', '.join(self.names) or 'none'}"
            )
        return tuple(float(edits.get(name, 0.0)) for name in self.names)

    def _blank(self, prompt: str, seed: int, place: int) -> _Drawing:
        zeros = np.zeros(self.hyper.spec.num_parameters, np.float32)
        return _Drawing(zeros, prompt, 0.0, self._amounts({}), seed, place)

    def _portion(self, waiting: int) -> int:
        """How many of those that wait are drawn now."""
        size = next((size for size in self._ready if size >= waiting), self._ready[-1])
        if waiting >= FULL * size or size == self._ready[0]:
            return min(waiting, size)
        return max(smaller for smaller in self._ready if smaller < waiting)

    def _write(self, asked: Sequence[tuple[np.ndarray, int]]) -> list[Subject]:
        """Those with equally many pictures at once, always `SUBJECTS` of them."""
        subjects_of: dict[int, Subject] = {}
        for count in sorted({len(pictures) for pictures, _ in asked}):
            members = [n for n, (pictures, _) in enumerate(asked) if len(pictures) == count]
            rows = _filled(members, SUBJECTS)
            start = time.perf_counter()
            pooled, tokens = self.hyper.embed(np.stack([asked[n][0] for n in rows]))
            loras = write_each(self.hyper, [asked[n][1] for n in rows], pooled, tokens)
            vectors = np.asarray(self._flat(loras))
            seconds = time.perf_counter() - start
            scores = self.hyper.familiarity_of(pooled)
            for k, n in enumerate(members):
                familiarity = None if scores is None else float(scores[k])
                subjects_of[n] = Subject(vectors[k].copy(), familiarity, seconds)
        return [subjects_of[n] for n in range(len(asked))]

    def _draw(self, asked: Sequence[_Drawing]) -> list[np.ndarray]:
        rows = _filled(asked, next(size for size in self._sizes if size >= len(asked)))
        noise, keys = self._noise(
            np.uint32([row.seed for row in rows]), np.int32([row.place for row in rows])
        )
        loras = self._loras(
            np.stack([row.vector for row in rows]),
            np.float32([row.strength for row in rows]),
            np.float32([row.amounts for row in rows]),
        )
        prompts = [row.prompt for row in rows]
        images = self.sd.sample(keys, prompts, lora=loras, latents=noise, **self._sampling)
        return [image.copy() for image in to_uint8(images)[: len(asked)]]  # a view keeps them all

    @functools.cached_property
    def _noise(self) -> Callable[[AnyArray, AnyArray], tuple[Array, Array]]:
        def one(seed: Array, place: Array) -> tuple[Array, Array]:
            key = jax.random.fold_in(jax.random.key(seed), place)
            return self.sd.noise(key, 1)[0], jax.random.fold_in(key, 1)

        return jax.jit(jax.vmap(one))

    @functools.cached_property
    def _flat(self) -> Callable[[Params], Array]:
        return jax.jit(lambda loras: vectorize.flatten(loras, self.hyper.spec))

    @functools.cached_property
    def _unflat(self) -> Callable[[AnyArray], Params]:
        return jax.jit(lambda vector: vectorize.unflatten(vector, self.hyper.spec))

    @functools.cached_property
    def _loras(self) -> Callable[[AnyArray, AnyArray, AnyArray], Params]:
        def all_edited(vectors: AnyArray, strengths: AnyArray, amounts: AnyArray) -> Params:
            loras = vectorize.unflatten(vectors, self.hyper.spec)
            if self.directions is not None:  # all of them always: one program for all edits
                named = {name: amounts[:, k] for k, name in enumerate(self.names)}
                loras, _ = edit(loras, self.directions, named)
            return factors.scale(loras, strengths)

        return jax.jit(all_edited)


def _filled(items: Sequence[T], size: int) -> list[T]:
    """Items and copies of the last one, `size` together."""
    return [*items, *[items[-1]] * (size - len(items))]
