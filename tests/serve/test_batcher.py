import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.serve.batcher import Batcher


class Recorder:
    """Doubles numbers, some at a time, once it is let go."""

    def __init__(self):
        self.batches, self.go, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, questions):
        self.begun.set()
        assert self.go.wait(20)
        self.batches.append(list(questions))
        return [2 * int(question) for question in questions]


@pytest.fixture(name="recorder")
def _recorder():
    return Recorder()


@pytest.fixture(name="pool")
def _pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def waiting(batcher, count):
    """Waits until so many questions are in the queue."""
    with batcher._changed:
        assert batcher._changed.wait_for(lambda: len(batcher._waiting) >= count, 20)


def test_what_comes_while_a_batch_runs_is_the_next_batch(recorder, pool):
    batcher = Batcher(recorder, most=4, wait_s=0.0)
    first = pool.submit(batcher.ask, [1])
    assert recorder.begun.wait(20)
    others = [pool.submit(batcher.ask, [k]) for k in range(2, 8)]
    waiting(batcher, 6)
    recorder.go.set()
    assert first.result(20) == [2]
    assert [other.result(20) for other in others] == [[2 * k] for k in range(2, 8)]
    assert recorder.batches[0] == [1] and [len(b) for b in recorder.batches] == [1, 4, 2]
    assert batcher.sizes == {1: 1, 4: 1, 2: 1}
    batcher.close()


def test_an_error_is_only_that_of_the_question_that_makes_it(recorder, pool):
    batcher = Batcher(recorder, most=8, wait_s=0.0)
    begin = pool.submit(batcher.ask, [0])
    assert recorder.begun.wait(20)
    asked = {word: pool.submit(batcher.ask, [word]) for word in ("1", "two", "3")}
    waiting(batcher, 3)
    recorder.go.set()
    assert begin.result(20) == [0]
    assert asked["1"].result(20) == [2] and asked["3"].result(20) == [6]
    with pytest.raises(ValueError, match="two"):
        asked["two"].result(20)
    batcher.close()


def test_a_full_queue_refuses_and_an_end_leaves_nobody_waiting(recorder, pool):
    batcher = Batcher(recorder, most=1, wait_s=0.0, most_waiting=2)
    begin = pool.submit(batcher.ask, [0])
    assert recorder.begun.wait(20)
    left = pool.submit(batcher.ask, [1, 2])
    waiting(batcher, 2)
    with pytest.raises(UserError, match="2 requests are waiting"):
        batcher.ask([3])
    end = pool.submit(batcher.close)
    with pytest.raises(UserError, match="ending"):
        left.result(20)
    recorder.go.set()
    end.result(20)
    assert begin.result(20) == [0]
    with pytest.raises(UserError, match="ending"):
        batcher.ask([4])
