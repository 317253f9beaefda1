"""Pictures that are read when they are asked for: a data set need not fit into memory."""

import collections
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.pictures.size_buckets import Size

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """`count` items, each made by `get` whenever it is asked for."""

    def __init__(self, count: int, get: Callable[[int], T]):
        self._numbers, self._get = range(count), get

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._numbers[index]
        return self._get(chosen) if isinstance(chosen, int) else [self._get(k) for k in chosen]


Load = Callable[[], Sequence[UInt8[np.ndarray, "h w 3"]]]


class LazyPictures:
    """Pictures of n subjects, of each its own number, all of one size.

    Args:
        loads: one function per subject, which gives its pictures.
        counts: how many those are.
        size: (height, width) of them all.
        mark: tells these pictures from others, without reading them.
    """

    def __init__(self, loads: Sequence[Load], counts: Sequence[int], size: Size, mark: str):
        self._loads, self.counts, self.size, self.mark = list(loads), tuple(counts), size, mark

    def __len__(self) -> int:
        return len(self._loads)

    def __getitem__(self, subject: int) -> UInt8[np.ndarray, "v h w 3"]:
        """The pictures of a subject."""
        loaded = np.asarray(self._loads[subject]())
        if loaded.shape != (wanted := (self.counts[subject], *self.size, 3)):
            raise ValueError(f"subject {subject}: pictures {loaded.shape}, expected {wanted}")
        return loaded

    def one_by_one(self, subjects: range) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The pictures of some subjects in turn; threads read a few subjects ahead."""
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            ahead: collections.deque[Future] = collections.deque()
            waiting = iter(subjects)
            while True:
                for subject in itertools.islice(waiting, 2 * threads - len(ahead)):
                    ahead.append(pool.submit(self.__getitem__, subject))
                if not ahead:
                    return
                yield from ahead.popleft().result()

    def map(
        self,
        function: Callable[[np.ndarray], Any],
        mark: str,
        times: int = 1,
        size: Size | None = None,
    ) -> "LazyPictures":
        """`function` of every subject's pictures, which makes `times` as many, of `size` (None: of
        the same)."""

        def mapped(subject: int) -> Any:
            return function(self[subject])

        return LazyPictures(
            [lambda k=k: mapped(k) for k in range(len(self))],
            [times * count for count in self.counts],
            size or self.size,
            f"{self.mark} {mark}",
        )


def of_array(images: UInt8[np.ndarray, "n v h w 3"]) -> LazyPictures:
    """Pictures that lie in memory: as many of every subject."""
    count, views, *size, _ = images.shape
    mark = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
    loads = [lambda k=k: images[k] for k in range(count)]
    return LazyPictures(loads, [views] * count, (size[0], size[1]), mark)
