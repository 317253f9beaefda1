import threading

import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.serve.batcher import Batcher, Busy


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


def up_to(most):
    return lambda waiting: min(waiting, most)


def results(futures):
    return [future.result(20) for future in futures]


def test_what_comes_while_a_batch_runs_is_the_next_batch(recorder):
    batcher = Batcher(recorder, up_to(4))
    first = batcher.submit([1])
    assert recorder.begun.wait(20)
    others = [batcher.submit([k]) for k in range(2, 8)]
    recorder.go.set()
    assert results(first) == [2]
    assert [results(other) for other in others] == [[2 * k] for k in range(2, 8)]
    assert recorder.batches[0] == [1] and [len(b) for b in recorder.batches] == [1, 4, 2]
    assert batcher.sizes == {1: 1, 4: 1, 2: 1}
    batcher.close()


def test_an_error_is_only_that_of_the_question_that_makes_it(recorder):
    batcher = Batcher(recorder, up_to(8))
    begin = batcher.submit([0])
    assert recorder.begun.wait(20)
    asked = {word: batcher.submit([word], ["a key"]) for word in ("two", "1")}
    assert asked["1"] == asked["two"]  # one key
    asked |= {word: batcher.submit([word]) for word in ("1", "3")}
    recorder.go.set()
    assert results(begin) == [0]
    assert results(asked["1"]) == [2] and results(asked["3"]) == [6]
    with pytest.raises(ValueError, match="two"):
        results(asked["two"])
    assert results(batcher.submit(["5"], ["a key"])) == [10]  # errors are not remembered
    batcher.close()


def test_what_was_asked_under_a_key_is_answered_once(recorder):
    batcher = Batcher(recorder, up_to(8), remembered=2)
    recorder.go.set()
    first = batcher.submit([1, 2, 1], ["a", None, "a"])
    assert first[0] is first[2] and results(first) == [2, 4, 2]
    assert results(batcher.submit([7, 2], ["a", None])) == [2, 4]
    assert results(batcher.submit([3, 4], ["b", "c"])) == [6, 8]  # "a" is forgotten
    assert results(batcher.submit([7], ["a"])) == [14]
    assert recorder.batches == [[1, 2], [2], [3, 4], [7]]
    batcher.close()


def test_only_after_company_is_company_waited_for(recorder):
    batcher = Batcher(recorder, up_to(8), wait_s=30.0)
    recorder.go.set()
    for _ in range(3):  # alone, with several questions: at once
        assert results(batcher.submit([1, 2])) == [2, 4]
    recorder.go.clear()
    recorder.begun.clear()
    first = batcher.submit([1])
    assert recorder.begun.wait(20)
    both = [batcher.submit([k]) for k in (2, 3)]
    recorder.go.set()
    assert results(first) + results(both[0]) + results(both[1]) == [2, 4, 6]
    alone = batcher.submit([4])
    assert not alone[0].done()
    rest = batcher.submit([*range(7)])  # a whole batch
    assert results(alone) + results(rest) == [8, *range(0, 14, 2)]
    batcher.close()


def test_a_full_queue_refuses_and_an_end_leaves_nobody_waiting(recorder):
    batcher = Batcher(recorder, up_to(1), most_waiting=2)
    begin = batcher.submit([0])
    assert recorder.begun.wait(20)
    left = batcher.submit([1, 2], ["a", None])
    for keys in ([None], ["b"]):
        with pytest.raises(Busy, match="2 requests are waiting"):
            batcher.submit([3], keys)
    assert batcher.submit([1], ["a"])[0] is left[0]  # takes no place
    end = threading.Thread(target=batcher.close)
    end.start()
    with pytest.raises(UserError, match="ending"):
        results(left)
    recorder.go.set()
    end.join(20)
    assert results(begin) == [0]
    with pytest.raises(UserError, match="ending"):
        batcher.submit([4])
