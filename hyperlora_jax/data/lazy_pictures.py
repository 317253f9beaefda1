"""Pictures that are read when they are asked for: a data set need not fit into memory."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hyperlora_jax.array_types import UInt8


class LazySequence(Sequence[Any]):
    """`count` items, each made by `get` whenever it is asked for."""

    def __init__(self, count: int, get: Callable[[int], Any]):
        self._numbers, self._get = range(count), get

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._numbers[index]
        return self._get(chosen) if isinstance(chosen, int) else [self._get(k) for k in chosen]


Load = Callable[[], UInt8[np.ndarray, "v h w 3"]]


class LazyPictures:
    """Looks like an array [n, v, h, w, 3] of bytes; rows are read, in threads, at every access.

    Args:
        loads: one function per subject, which gives its v pictures.
        one: their shape (v, h, w).
        mark: tells these pictures from others, without reading them.
    """

    def __init__(self, loads: Sequence[Load], one: tuple[int, int, int], mark: str):
        self._loads, self.mark = list(loads), mark
        self.shape = (len(self._loads), *one, 3)
        self.ndim, self.dtype = len(self.shape), np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self._loads)

    def __getitem__(self, index: Any) -> UInt8[np.ndarray, "*any"]:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int | np.integer):
            return self._loads[int(first)]()[tuple(rest)]
        chosen = np.arange(len(self))[first]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            rows = list(threads.map(lambda k: self._loads[k](), chosen))
        found = np.stack(rows) if rows else np.zeros((0, *self.shape[1:]), np.uint8)
        return found[(slice(None), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self[:], dtype)

    def map(
        self, function: Callable[[np.ndarray], np.ndarray], num_views: int, mark: str
    ) -> "LazyPictures":
        """`function` of every subject's pictures, which become `num_views` of the same size."""
        loads = [lambda load=load: function(load()) for load in self._loads]
        return LazyPictures(loads, (num_views, *self.shape[2:4]), f"{self.mark} {mark}")
