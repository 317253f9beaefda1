"""Batches for training, as Grain pipelines that resume exactly.

Step t of seed s is a pure function of (s, t): a global shuffle of every epoch, infinite, the same
on one host and on many. A host takes its rows of every global batch (`sharding.host_rows`), so a
run may go on with another number of hosts and sees the same records in the same order. The
iterators' states are small JSON-able dicts (the number of the next step).
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain.python as grain
import jax
import numpy as np

from hyperlora_jax.array_types import Int, Params
from hyperlora_jax.batches import stable_random
from hyperlora_jax.batches.ragged import Ragged
from hyperlora_jax.errors import UserError

Batch = dict[str, Any]  # arrays, or trees of them


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


@runtime_checkable
class SubjectOrder(Protocol):
    """Which subject is the i-th of an endless series."""

    def at(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Subject numbers at some positions of the series."""
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
    arrays: Mapping[str, object],
    batch_size: int,
    seed: int,
    rows: Int[np.ndarray, " b"] | None = None,
) -> grain.DatasetIterator:
    """Batches of rows drawn from trees of arrays, or of what is indexed like one, of one length.

    A batch holds of every array what belongs to the positions `rows` of the global batch of
    `batch_size` (None = all), and the numbers of the records under "record_id".
    """
    num_records = common_length(arrays)
    order = Order(num_records, seed)
    own = np.arange(batch_size) if rows is None else rows

    def make_batch(step: int) -> Batch:
        records = order.at(step * batch_size + own)
        batch = jax.tree.map(lambda array: np.asarray(array[records]), dict(arrays))
        return {**batch, "record_id": records}

    return step_batches(make_batch)


def check_numbers(num_references: int | Sequence[int], num_targets: int) -> tuple[int, int]:
    """(fewest, most) references of a subject.

    Raises:
        UserError: they are no such numbers, named as configs do.
    """
    pair = (num_references, num_references) if isinstance(num_references, int) else num_references
    if len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
        raise UserError(
            f"train.num_references: got {num_references}, expected (fewest, most), at least 1 and "
            "in this order"
        )
    if num_targets < 1:
        raise UserError(f"train.images_per_subject: got {num_targets}, expected at least 1")
    return pair[0], pair[1]


def subject_batches(  # noqa: PLR0913
    references: Ragged | None,
    targets: Ragged | None,
    batch_size: int,
    seed: int,
    num_references: int | Sequence[int] = 1,
    num_targets: int = 1,
    per_subject: Params | None = None,
    subjects: np.ndarray | None = None,
    subjects_until: int | None = None,
    order: SubjectOrder | None = None,
    rows: Int[np.ndarray, " b"] | None = None,
) -> grain.DatasetIterator:
    """Batches of subjects with some of their references and some of their targets.

    A subject with fewer than `num_references` gives what it has, each once. One with fewer than
    `num_targets` gives all of them in turn, some of them again: every target of a batch gets a
    noise and a time step of its own, so that a repeated one is another question. Nothing is drawn
    twice before everything was drawn once.

    Args:
        references: what a subject is told by, at least one of each.
        targets: what is picked together (latents, captions), at least one of each.
        batch_size: subjects per step, over all hosts.
        seed: fixes order and picks; what is picked depends on (seed, step, record) only.
        num_references: how many to give, or (fewest, most).
        num_targets: how many targets per subject.
        per_subject: arrays [subjects, ...] or what is indexed like one, e.g. LoRA vectors.
        subjects: numbers of the subjects to draw from (a split); None is all of them.
        subjects_until: from this step on, all subjects are drawn from; None is never.
        order: in which `subjects` are drawn until then; None shuffles them.
        rows: this host's positions in every global batch; None is all of them.

    A batch holds every array under its name, references as [b, most, ...] with
    "reference_mask" [b, most] (False = not given), targets as [b, num_targets, ...], and
    "record_id" [b], the subjects' numbers; "step" [b] is the number of the batch. Where no subject
    has `most` references, `most` is what the one with most of them has.

    Raises:
        UserError: numbers that cannot be.
    """
    per_subject = per_subject or {}
    ragged = {k: part for k, part in (("r", references), ("t", targets)) if part is not None}
    num_records = common_length({**ragged, **per_subject})
    chosen = np.arange(num_records) if subjects is None else np.asarray(subjects, np.int64)
    least, most = check_numbers(num_references, num_targets)
    available = np.ones(1) if references is None else references.counts
    shown = np.ones(1) if targets is None else targets.counts
    most = min(most, int(available.max()))
    some, everyone = Order(len(chosen), seed), Order(num_records, seed)
    own = np.arange(batch_size) if rows is None else rows

    def make_batch(step: int) -> Batch:
        positions = step * batch_size + own
        if subjects_until is not None and step >= subjects_until:
            records = everyone.at(positions)
        elif order is not None:
            records = order.at(positions)
        else:
            records = chosen[some.at(positions)]
        batch: Batch = {name: np.asarray(array[records]) for name, array in per_subject.items()}
        generators = [np.random.default_rng((seed, step, int(record))) for record in records]
        if references is not None:
            counts = available[records].tolist()
            columns = _drawn(generators, counts, most)
            ranges = [(min(least, count), min(most, count) + 1) for count in counts]
            given = np.array([g.integers(*r) for g, r in zip(generators, ranges, strict=True)])
            batch["reference_mask"] = np.arange(most) < given[:, None]
            batch |= references.at(records, columns)
        if targets is not None:
            columns = _drawn(generators, shown[records].tolist(), num_targets)
            batch |= targets.at(records, columns)
        batch["step"] = np.full(len(records), step, np.int32)
        return {**batch, "record_id": records}

    return step_batches(make_batch)


def _drawn(
    generators: Sequence[np.random.Generator], counts: Sequence[int], most: int
) -> Int[np.ndarray, "b k"]:
    """`most` numbers below each of `counts`, none twice before each was there once."""
    drawn = [g.permutation(own)[:most] for g, own in zip(generators, counts, strict=True)]
    if min(counts) < most:
        drawn = [np.resize(own, most) for own in drawn]
    return np.stack(drawn)


def common_length(arrays: object) -> int:
    """Length of the first axis of all arrays of a tree; ValueError when they differ."""
    flat = jax.tree.leaves_with_path(arrays)
    lengths = {jax.tree_util.keystr(path): len(array) for path, array in flat}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"arrays of one length expected, got {lengths}")
    return next(iter(lengths.values()))
