"""Questions that arrive together are answered together, in one thread.

While a batch runs, new questions wait and become the next one. Who asks alone never waits for
company; after a batch of several askers the next one waits until all of them have asked again, for
at most `wait_s` or `PATIENCE` of the time that it took: half a batch costs nearly a whole one. An
error is that of the one question that raises it alone, not of its companions.
"""

import collections
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from hyperlora_jax.errors import UserError

PATIENCE = 0.25  # of the last batch's seconds


class Busy(UserError):
    """Too many questions wait already."""


class _Asked(NamedTuple):
    question: object
    future: Future
    asker: object  # one for all questions of a call


class Batcher:
    """Collects questions.

    Args:
        answer: answers of several questions, in order; called in this object's thread only.
        portion: of so many that wait, how many to answer at once.
        wait_s: seconds that are waited for the askers of the last batch at least.
        most_waiting: questions above which new ones are refused.
        remembered: answers that are kept by their keys, those last asked for.
    """

    def __init__(
        self,
        answer: Callable[[list], Sequence],
        portion: Callable[[int], int],
        wait_s: float = 0.004,
        most_waiting: int = 256,
        remembered: int = 128,
    ) -> None:
        self.sizes = collections.Counter[int]()  # batches that ran, by size
        self._answer, self._portion, self._wait_s = answer, portion, wait_s
        self._most_waiting, self._remembered = most_waiting, remembered
        self._waiting: collections.deque[_Asked] = collections.deque()
        self._kept: collections.OrderedDict[Hashable, Future] = collections.OrderedDict()
        self._changed, self._closed = threading.Condition(), False
        self._expected, self._took_s = 0, 0.0  # questions that may come back, and after how long
        self._thread = threading.Thread(target=self._work, daemon=True, name="batches")
        self._thread.start()

    def submit(
        self, questions: Sequence[object], keys: Sequence[Hashable] | None = None
    ) -> list[Future]:
        """The answers to come, in order. They may be shared: cancel none.

        Args:
            keys: one for each question; equal ones are answered once and remembered, None is not.

        Raises:
            Busy: too many questions wait already.
        """
        keys, asker = keys or [None] * len(questions), object()
        with self._changed:
            if self._closed:
                raise UserError("this program is ending")
            if len(self._waiting) + [*map(self._known, keys)].count(None) > self._most_waiting:
                raise Busy(
                    f"{len(self._waiting)} requests are waiting already; try again in a moment"
                )
            futures = []
            for question, key in zip(questions, keys, strict=True):
                if (future := self._known(key)) is None:
                    future = Future()
                    self._waiting.append(_Asked(question, future, asker))
                    if key is not None:
                        self._kept[key] = future
                futures.append(future)
            while len(self._kept) > self._remembered:
                self._kept.popitem(last=False)
            self._changed.notify_all()
        return futures

    def close(self) -> None:
        """Ends the thread after the batch that it is at; what still waits gets an error."""
        with self._changed:
            self._closed = True
            left = [asked.future for asked in self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for future in left:
            future.set_exception(UserError("this program is ending"))
        self._thread.join()

    def _known(self, key: Hashable) -> Future | None:
        future = None if key is None else self._kept.get(key)
        if future is None or (future.done() and future.exception()):
            return None
        self._kept.move_to_end(key)
        return future

    def _work(self) -> None:
        while batch := self._next():
            self.sizes[len(batch)] += 1
            start = time.monotonic()
            self._settle(batch)
            self._took_s = time.monotonic() - start

    def _next(self) -> list[_Asked]:
        """The next batch; [] at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            # Who waits already, and who has just been answered: together they fill larger batches.
            company = self._expected + len(self._waiting) if self._expected else 0
            enough = min(company, self._portion(self._most_waiting))
            self._changed.wait_for(
                lambda: len(self._waiting) >= enough or self._closed,
                max(self._wait_s, PATIENCE * self._took_s),
            )
            if not self._waiting:
                return []
            batch = [self._waiting.popleft() for _ in range(self._portion(len(self._waiting)))]
            alone = len({asked.asker for asked in batch}) == 1
            self._expected = 0 if alone else len(batch)
            return batch

    def _settle(self, batch: Sequence[_Asked]) -> None:
        try:
            answers = self._answer([asked.question for asked in batch])
        except Exception as error:  # belongs to whoever asked
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:
                for one in batch:
                    self._settle([one])
            return
        for asked, answer in zip(batch, answers, strict=True):
            asked.future.set_result(answer)
