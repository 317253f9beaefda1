import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.method_loras import runnable_methods
from hyperlora_jax.evaluate.methods import method_order, number_of, title
from hyperlora_jax.evaluate.training_loras import TrainingLoras

ALL = ("base", "mean_lora", "nearest", "noisy_copy", "pca_gaussian", "shuffled", "generated",
       "refined_5", "conventional", "exact")  # fmt: skip
NONE = TrainingLoras((), (), "runs/targets: no LoRA dataset", "runs/targets: no LoRA dataset")
BARE = TrainingLoras((), (np.arange(5),), "", "imported: holds no reference pictures")
FULL = TrainingLoras((), (np.arange(5),), "", "")


def test_without_loras_the_rest_runs_and_a_line_says_why():
    names, lines = runnable_methods(ALL, (), NONE, 4, 8, given=False)
    assert names == ["base", "shuffled", "generated", "refined_5", "conventional"]
    assert lines == [
        "left out mean_lora, nearest, noisy_copy, pca_gaussian (runs/targets: no LoRA dataset)"
    ]


def test_loras_without_pictures_serve_what_looks_at_none():
    names, lines = runnable_methods(ALL, (), BARE, 4, 8, given=False)
    assert {"mean_lora", "pca_gaussian"} < {*names} and not {"nearest", "noisy_copy"} & {*names}
    assert lines == ["left out nearest, noisy_copy (imported: holds no reference pictures)"]


def test_nothing_is_left_out_where_everything_is_there():
    names, lines = runnable_methods((*ALL, "base"), ("paper",), FULL, 4, 8, given=True)
    assert names == [*(name for name in ALL if name != "exact"), "paper"] and not lines


def test_numbered_methods_have_titles_and_places():
    names = ["base", "generated", "generated_2", "generated_8", "conventional_1", "refined_25", "x"]
    assert method_order(names) == [
        "refined_25", "generated_8", "generated_2", "generated", "conventional_1", "base", "x",
    ]  # fmt: skip
    assert title("generated_8") == "generated, 8 pictures"
    assert title("conventional_1") == "conventional, 1 picture"
    assert not {number_of(name) for name in ("generated", "refined_0", "base_2")} - {None}


def test_one_subject_has_nobody_to_exchange_with():
    names, lines = runnable_methods(ALL, (), FULL, 1, 8, given=False)
    assert "shuffled" not in names and "there is 1" in lines[0]


def test_what_was_asked_for_and_cannot_run_is_refused():
    with pytest.raises(UserError, match=r"evaluate\.methods: mean_lora cannot run \(runs"):
        runnable_methods(ALL, (), NONE, 4, 8, given=True)
    with pytest.raises(UserError, match=r"generated_9 cannot run \(at most 8 .*num_views"):
        runnable_methods(("generated_9",), (), NONE, 4, 8, given=True)
    with pytest.raises(UserError, match="method 'best' is unknown, expected one of base"):
        runnable_methods(("best",), (), FULL, 4, 8, given=False)
