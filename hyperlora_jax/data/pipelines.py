"""Batches for training, as Grain pipelines that resume exactly.

Step t of seed s is a pure function of (s, t): a global shuffle of every epoch, infinite, the same
on one host and on many. Shard k of n takes the k-th n-th of every global batch, so a run may go on
with another number of hosts and sees the same records in the same order. The iterators' states are
small JSON-able dicts (the number of the next step).
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import grain.python as grain
import numpy as np

from hyperlora_jax.array_types import Int
from hyperlora_jax.data import stable_random
from hyperlora_jax.errors import UserError

Batch = dict[str, np.ndarray]


class Order:
    """Which record is the i-th of an endless series of shuffled epochs. Random access.

    The permutation of an epoch is drawn whole (1 ms for 65,000 records) and the last few are kept:
    Grain's own shuffle is O(1) in memory, but takes milliseconds a record for small datasets.
    """

    def __init__(self, num_records: int, seed: int):
        if num_records < 1:
            raise UserError("no records to train on: expected at least one")
        self.num_records = num_records
        self._epoch = functools.lru_cache(maxsize=4)(
            lambda epoch: stable_random.permutation(seed, epoch, num_records)
        )

    def at(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Record numbers at some positions of the series."""
        epochs, offsets = np.divmod(positions, self.num_records)
        records = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            records[mine] = self._epoch(int(epoch))[offsets[mine]]
        return records

    def records(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Record numbers from position start to stop."""
        return self.at(np.arange(start, stop))


@runtime_checkable
class SubjectOrder(Protocol):
    """Which subject is the i-th of an endless series."""

    def records(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Subject numbers from position start to stop."""
        ...


def step_batches(
    make_batch: Callable[[int], Batch], num_threads: int = 1, prefetch: int = 2
) -> grain.DatasetIterator:
    """Endless iterator over make_batch(0), make_batch(1), ... with get_state() and set_state().

    Batches are prepared ahead by threads; `make_batch` must be a pure function of the step.
    """
    steps = grain.MapDataset.range(sys.maxsize).map(make_batch)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads, prefetch)))


def array_batches(
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    num_shards: int = 1,
) -> grain.DatasetIterator:
    """Batches of rows drawn from arrays (memory-mapped ones too) of one common length.

    `batch_size` is that of all shards together; a batch holds batch_size / num_shards rows of
    every array and their numbers under "record_id".
    """
    num_records = common_length(arrays)
    order = Order(num_records, seed)
    first, count = shard_slice(batch_size, shard_index, num_shards)

    def make_batch(step: int) -> Batch:
        start = step * batch_size + first
        records = order.records(start, start + count)
        batch = {name: np.asarray(array[records]) for name, array in arrays.items()}
        return {**batch, "record_id": records}

    return step_batches(make_batch)


def subject_batches(
    references: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    batch_size: int,
    seed: int,
    num_references: int | tuple[int, int] = 1,
    num_targets: int = 1,
    per_subject: Mapping[str, Any] | None = None,
    subjects: np.ndarray | None = None,
    subjects_until: int | None = None,
    order: SubjectOrder | None = None,
    shard_index: int = 0,
    num_shards: int = 1,
) -> grain.DatasetIterator:
    """Batches of subjects with some of their references and some of their targets.

    Args:
        references: arrays [subjects, r, ...]; every subject has r reference pictures.
        targets: arrays [subjects, m, ...]; picked together (pictures, captions, latents).
        batch_size: subjects per step, over all shards.
        seed: fixes order and picks; what is picked depends on (seed, step, record) only.
        num_references: how many to give, or (least, most); without repeats.
        num_targets: how many targets per subject; without repeats.
        per_subject: arrays [subjects, ...] or what is indexed like one, e.g. LoRA vectors.
        subjects: numbers of the subjects to draw from (a split); None is all of them.
        subjects_until: from this step on, all subjects are drawn from; None is never.
        order: in which `subjects` are drawn until then; None shuffles them.
        shard_index: which part of every global batch. num_shards: how many parts.

    A batch holds every array under its name, references as [b, most, ...] with
    "reference_mask" [b, most] (False = not given), targets as [b, num_targets, ...], and
    "record_id" [b], the subjects' numbers; "step" [b] is the number of the batch.
    """
    per_subject = per_subject or {}
    num_records = common_length({**references, **targets, **per_subject})
    chosen = np.arange(num_records) if subjects is None else np.asarray(subjects, np.int64)
    least, most = (
        num_references if isinstance(num_references, tuple) else (num_references, num_references)
    )
    available, shown = _second_length(references), _second_length(targets)
    if not (1 <= least <= most <= available or not references):
        raise UserError(f"num_references is {num_references}, subjects have {available} references")
    if not (1 <= num_targets <= shown or not targets):
        raise UserError(f"num_targets is {num_targets}, subjects have {shown} targets")
    some, everyone = Order(len(chosen), seed), Order(num_records, seed)
    first, count = shard_slice(batch_size, shard_index, num_shards)

    def make_batch(step: int) -> Batch:
        start = step * batch_size + first
        if subjects_until is not None and step >= subjects_until:
            records = everyone.records(start, start + count)
        elif order is not None:
            records = order.records(start, start + count)
        else:
            records = chosen[some.records(start, start + count)]
        batch: Batch = {name: np.asarray(array[records]) for name, array in per_subject.items()}
        generators = [np.random.default_rng((seed, step, int(record))) for record in records]
        rows = records[:, None]
        if references:
            columns = np.stack([g.permutation(available)[:most] for g in generators])
            given = np.array([g.integers(least, most + 1) for g in generators])
            batch["reference_mask"] = np.arange(most) < given[:, None]
            batch |= {name: np.asarray(array[rows, columns]) for name, array in references.items()}
        if targets:
            columns = np.stack([g.permutation(shown)[:num_targets] for g in generators])
            batch |= {name: np.asarray(array[rows, columns]) for name, array in targets.items()}
        batch["step"] = np.full(len(records), step, np.int32)
        return {**batch, "record_id": records}

    return step_batches(make_batch)


def common_length(arrays: Mapping[str, Any]) -> int:
    """Length of the first axis of all arrays; ValueError when they differ."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"arrays of one length expected, got {lengths}")
    return next(iter(lengths.values()))


def _second_length(arrays: Mapping[str, np.ndarray]) -> int:
    lengths = {name: array.shape[1] for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arrays with one second axis expected, got {lengths}")
    return next(iter(lengths.values()), 0)


def shard_slice(batch_size: int, shard_index: int, num_shards: int) -> tuple[int, int]:
    """(first, count) of a shard's rows in every global batch; UserError if it cannot be divided."""
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard_index {shard_index} of {num_shards} shards")
    if batch_size < 1 or batch_size % num_shards:
        raise UserError(f"batch size {batch_size} cannot be divided among {num_shards} hosts")
    count = batch_size // num_shards
    return shard_index * count, count
