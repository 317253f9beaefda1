"""Questions that arrive together are answered together, in one thread.

While a batch runs, new questions wait and become the next one; a lone question waits `wait_s` for
company. An error is that of the one question that raises it alone, not of its companions.
"""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from hyperlora_jax.errors import UserError


class Batcher:
    """Collects questions.

    Args:
        answer: answers of several questions, in order; called in this object's thread only.
        most: questions at once; may be changed later.
        wait_s: seconds that a lone question waits for others.
        most_waiting: questions above which new ones are refused.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any]], Sequence[Any]],
        most: int,
        wait_s: float = 0.004,
        most_waiting: int = 256,
    ) -> None:
        self.most, self.sizes = most, collections.Counter[int]()  # batches that ran, by size
        self._answer, self._wait_s, self._most_waiting = answer, wait_s, most_waiting
        self._waiting: collections.deque[tuple[Any, Future[Any]]] = collections.deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, daemon=True, name="batches")
        self._thread.start()

    def ask(self, questions: Sequence[Any]) -> list[Any]:
        """Answers, in order, once all are there.

        Raises:
            UserError: too many questions wait already; whatever answering one of these raises.
        """
        futures: list[Future[Any]] = [Future() for _ in questions]
        with self._changed:
            if self._closed:
                raise UserError("this program is ending")
            if len(self._waiting) + len(questions) > self._most_waiting:
                raise UserError(
                    f"{len(self._waiting)} requests are waiting already; try again in a moment"
                )
            self._waiting.extend(zip(questions, futures, strict=True))
            self._changed.notify_all()
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the thread after the batch that it is at; what still waits gets an error."""
        with self._changed:
            self._closed = True
            left = [future for _, future in self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for future in left:
            future.set_exception(UserError("this program is ending"))
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self.sizes[len(batch)] += 1
            self._settle(batch)

    def _next(self) -> list[tuple[Any, "Future[Any]"]]:
        """The next batch; [] at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            end = time.monotonic() + self._wait_s
            while not self._closed and len(self._waiting) < self.most:
                if not self._changed.wait(end - time.monotonic()) or time.monotonic() >= end:
                    break
            return [self._waiting.popleft() for _ in range(min(self.most, len(self._waiting)))]

    def _settle(self, batch: Sequence[tuple[Any, "Future[Any]"]]) -> None:
        try:
            answers = self._answer([question for question, _ in batch])
        except Exception as error:  # belongs to whoever asked
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for one in batch:
                    self._settle([one])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)
