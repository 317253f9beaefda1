"""`hyperlora distill` in a workdir that holds LoRAs already: nothing is mixed, nothing is lost."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli.main import run_command
from hyperlora_jax.distill import distillation
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.targets.lora_targets import open_lora_targets
from hyperlora_jax.targets.spool import finished_files

pytestmark = pytest.mark.usefixtures("small_base")
AVATARS = str(Path(__file__).parents[2] / "configs" / "avatars.py")
SETTINGS = {
    "num_slots": 1, "num_steps": 4, "steps_per_call": 2, "save_every_steps": 2, "rank": 1,
    "preset": "w2w", "encoders": "()",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(name="people")
def _people(tmp_path):
    noise = np.random.default_rng(0)
    for name in ("anna", "bert", "carl", "dora"):
        (tmp_path / "people" / name).mkdir(parents=True)
        for k in range(2):
            pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "people" / name / f"{k}.png")
    return tmp_path / "people"


@pytest.fixture(name="distill")
def _distill(people, tmp_path, capsys):
    """distill(3, rank=2) → (exit code, lines said)."""

    def command(count, source=people, **settings):
        given = {"num_concepts": count, **SETTINGS, **settings}
        flags = [f"--config.distill.{key}={value}" for key, value in given.items()]
        code = run_command(
            "distill",
            ["--config", AVATARS, "--workdir", str(tmp_path / "run"),
             f"--config.data.source={source}", *flags],
        )  # fmt: skip
        said = capsys.readouterr()
        lines = (said.out + said.err.replace("\r", "\n")).splitlines()
        others = ("%|", "to train on", "remembered by")  # progress, and lines of the config
        return code, [line for line in lines if line and not any(text in line for text in others)]

    return command


def interrupted(distill, after, *args, **settings):
    """A run that is killed when `after` LoRAs are in the spool."""
    written, write = [], distillation.write_finished

    def killed(*given):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(1)
        return write(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "write_finished", killed)
        assert distill(*args, **settings)[0] == 130


def times(tmp_path):
    """{id: time of writing} of the spool's LoRAs."""
    files = finished_files(tmp_path / "run" / "spool")
    return {name: file.stat().st_mtime_ns for name, file in files.items()}


def test_another_recipe_rank_or_base_is_refused_and_both_sides_are_named(
    distill, tmp_path, monkeypatch
):
    interrupted(distill, 2, 4)
    before = times(tmp_path)
    assert len(before) == 2
    other = {"num_steps": 6, "recipe.learning_rate": 0.001, "steps_per_call": 3}
    code, said = distill(4, **other)
    assert code == 2 and said[-1] == (
        f"hyperlora distill: {tmp_path / 'run' / 'spool'} was made with "
        "recipe.learning_rate = 0.01, recipe.num_steps = 4, this run has "
        "recipe.learning_rate = 0.001, recipe.num_steps = 6; use another workdir"
    )
    assert times(tmp_path) == before and not (tmp_path / "run" / "targets").exists()

    assert distill(4)[0] == 0
    assert before.items() <= times(tmp_path).items(), "a finished LoRA was fitted twice"
    for settings, named in (
        ({"rank": 2}, "rank = 1"),
        ({"seed": 5}, "seed = 0"),
        ({"flips": True}, "pictures.flips = None, this run has pictures.flips = True"),
        ({"prompt": "a cat"}, "pictures.prompt = None, this run has pictures.prompt = 'a cat'"),
        ({"splits": "hash"}, "splits = 'train', this run has splits = 'hash'"),
    ):
        code, said = distill(4, **settings)
        assert code == 2 and "targets was made with " in said[-1] and named in said[-1]
    base = distillation.load_frozen("tiny-sd", None, None)
    unet = jax.tree.map(lambda leaf: leaf + 1, base.params["unet"])
    monkeypatch.setattr(distillation, "load_frozen", lambda *_: base.replace_params({"unet": unet}))
    code, said = distill(4)
    assert code == 2 and "was made with base_hash = '" in said[-1]


def test_more_concepts_extend_the_dataset_and_a_finished_one_is_there_already(distill, tmp_path):
    assert distill(2) == (0, [f"wrote {tmp_path / 'run' / 'targets'}: LoRAs of 2 concepts"])
    written = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert len({path.stat().st_mode for path in written}) == 1, "some files are not for all"
    two, before = open_lora_targets(tmp_path / "run" / "targets"), times(tmp_path)
    matrix = two.matrix()
    code, said = distill(2)
    there = f"already there: {tmp_path / 'run' / 'targets'} has LoRAs of 2 of 2 concepts"
    assert (code, said[-1]) == (0, there)

    code, said = distill(4)
    assert code == 0 and said[-1].endswith("LoRAs of 4 concepts, 2 of them were there")
    four = open_lora_targets(tmp_path / "run" / "targets")
    assert four.ids == ["anna", "bert", "carl", "dora"]
    np.testing.assert_array_equal(four.matrix()[:2], matrix)
    assert before.items() <= times(tmp_path).items(), "a finished LoRA was fitted twice"
    assert four.facts["pictures"]["num_identities"] == 4

    code, said = distill(3)  # fewer: nothing is thrown away
    assert code == 0 and said[-1].startswith("already there: ") and "3 of 3" in said[-1]
    assert len(open_lora_targets(tmp_path / "run" / "targets")) == 4


def test_a_dataset_whose_spool_is_gone_is_extended_too(distill, tmp_path):
    assert distill(2)[0] == 0
    matrix = open_lora_targets(tmp_path / "run" / "targets").matrix()
    shutil.rmtree(tmp_path / "run" / "spool")
    code, said = distill(3)
    assert code == 0 and said[-1].endswith("LoRAs of 3 concepts, 2 of them were there")
    found = open_lora_targets(tmp_path / "run" / "targets")
    assert found.ids == ["anna", "bert", "carl"] and list(times(tmp_path)) == ["carl"]
    np.testing.assert_array_equal(found.matrix()[:2], matrix)
    assert found[0].captions == ("", "") and len(found[0].targets) == 2


def test_moved_pictures_are_the_same_and_replaced_ones_are_refused(distill, people, tmp_path):
    interrupted(distill, 1, 3)
    moved = tmp_path / "elsewhere"
    people.rename(moved)
    code, said = distill(3, source=moved)
    assert code == 0 and said[-1].endswith("LoRAs of 3 concepts, 1 of them were there")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(moved / "bert" / "0.png")
    code, said = distill(3, source=moved)
    assert code == 2 and "concept 'bert' was fitted to pictures of hash " in said[-1]
    assert "use another workdir" in said[-1]


def test_concepts_that_come_and_go_are_not_mixed(distill, people, tmp_path):
    assert distill(3)[0] == 0
    shutil.move(people / "carl", tmp_path / "carl")
    code, said = distill(3)
    assert code == 2 and "holds 3 concepts, of which this run lacks 'carl'" in said[-1]
    shutil.move(tmp_path / "carl", people / "aaron")
    code, said = distill(4)
    assert code == 2 and "this run lacks 'carl'" in said[-1]


def test_fewer_concepts_than_begun_are_finished_and_the_rest_is_kept(distill, tmp_path):
    interrupted(distill, 3, 4)
    code, said = distill(2)
    assert code == 0 and said == [
        "1 LoRAs of the spool are of other concepts and stay there",
        f"wrote {tmp_path / 'run' / 'targets'}: LoRAs of 2 concepts, 2 of them were there",
    ]
    assert open_lora_targets(tmp_path / "run" / "targets").ids == ["anna", "bert"]
    before = times(tmp_path)
    assert distill(4)[0] == 0
    assert open_lora_targets(tmp_path / "run" / "targets").ids == ["anna", "bert", "carl", "dora"]
    assert before.items() <= times(tmp_path).items()


def test_a_spool_and_a_dataset_without_facts_are_compared_by_what_is_known(distill, tmp_path):
    interrupted(distill, 2, 3)
    (tmp_path / "run" / "spool" / "facts.json").unlink()
    code, said = distill(3, rank=2)
    assert code == 2 and "'anna' was made with num_parameters = " in said[-1]
    code, said = distill(3, num_steps=2)
    assert code == 2 and "made with num_steps = 4, this run has num_steps = 2" in said[-1]
    code, said = distill(3)
    assert code == 0 and "2 LoRAs of an older version are taken over" in said[0]

    targets = tmp_path / "run" / "targets"
    (targets / "concepts.json").unlink()
    shutil.rmtree(tmp_path / "run" / "spool")
    metadata = json.loads((targets / "metadata.json").read_text())
    kept = ("recipe", "base", "dtype", "seed", "pictures", "encoders")
    metadata["facts"] = {name: metadata["facts"][name] for name in kept}
    del metadata["facts"]["pictures"]["pictures"]
    (targets / "metadata.json").write_text(json.dumps(metadata))
    assert distill(3)[1][-1].startswith("already there: ")
    code, said = distill(3, rank=2)
    assert code == 2 and "was made with spec = '" in said[-1]
    metadata["facts"] = {"import": {"imported": 3}}
    (targets / "metadata.json").write_text(json.dumps(metadata))
    code, said = distill(3)
    assert code == 2 and "`hyperlora distill` did not make" in said[-1]


def test_a_diverging_concept_goes_to_quarantine_and_the_others_finish(
    distill, people, tmp_path, monkeypatch
):
    """Latents of one concept are made so large that its first loss is not finite."""
    fit_loras, calls = distillation.fit_loras, []

    def of_bert(*args, **kwargs):
        given, load = list(args), args[3].load
        calls.append(list(args[3].numbers))

        def huge(number):
            latents, text = load(number)
            return (latents * np.float32(1e36) if number == 1 else latents), text

        given[3] = dataclasses.replace(args[3], load=huge)
        return fit_loras(*given, **kwargs)

    monkeypatch.setattr(distillation, "fit_loras", of_bert)
    code, said = distill(3, num_slots=2)
    assert code == 0, said
    quarantine = tmp_path / "run" / "targets" / "quarantine.jsonl"
    assert said == [
        f"wrote {tmp_path / 'run' / 'targets'}: LoRAs of 2 concepts",
        f"1 of 3 concepts in quarantine ({quarantine}): bert: {REASON}",
    ]
    assert json.loads(quarantine.read_text()) == {
        "id": "bert", "source": str(people), "reason": REASON
    }  # fmt: skip
    found = open_lora_targets(tmp_path / "run" / "targets")
    assert found.ids == ["anna", "carl"] and np.isfinite(found.matrix()).all()
    code, said = distill(3, num_slots=2)
    assert code == 0 and calls == [[0, 1, 2]], "what diverged is not tried again"
    assert "has LoRAs of 2 of 3 concepts" in said[0] and "1 of 3 concepts" in said[1]

    # With other pictures it deserves another attempt.
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(people / "bert" / "0.png")
    monkeypatch.setattr(distillation, "fit_loras", fit_loras)
    code, said = distill(3, num_slots=2)
    assert code == 0 and said[-1].endswith("LoRAs of 3 concepts, 2 of them were there")
    assert not quarantine.exists()


REASON = "its loss is not finite at step 1 of 4"


def test_when_every_concept_diverges_nothing_is_written(distill, tmp_path):
    code, said = distill(2, **{"recipe.learning_rate": 1e38})
    assert code == 2 and len(said) == 1
    assert said[0].startswith(
        "hyperlora distill: all 2 concepts are in quarantine, first anna: its "
    )
    assert "learning_rate" in said[0] and not (tmp_path / "run" / "targets").exists()


def test_text_states_that_are_not_finite_are_named(distill, small_base, monkeypatch):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, small_base.params["text_encoder"])
    sd = small_base.replace_params({"text_encoder": broken})
    monkeypatch.setattr(distillation, "load_frozen", lambda *_: sd)
    code, said = distill(2)
    assert code == 2 and "the text states of its captions are not finite; do the base's" in said[-1]


def test_unfinished_slots_go_on_in_another_number_of_slots(distill, tmp_path):
    assert distill(3)[0] == 0
    whole = open_lora_targets(tmp_path / "run" / "targets").matrix()
    shutil.rmtree(tmp_path / "run")
    advance, calls = slot_state.advance, []

    def killed(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return advance(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_state, "advance", killed)
        assert distill(3, num_slots=2)[0] == 130
    assert list((tmp_path / "run").glob("slots-*"))
    steps = []

    def counted(*args, **kwargs):
        steps.append(kwargs["num_steps"])
        return advance(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_state, "advance", counted)
        assert distill(3, num_slots=1)[0] == 0
    assert sum(steps) == 3 * 4 - 2, "one of them had made half of its steps"
    found = open_lora_targets(tmp_path / "run" / "targets")
    np.testing.assert_allclose(found.matrix(), whole, atol=1e-6)
    assert [found[k].num_steps for k in range(3)] == [4, 4, 4]


def test_a_folder_with_a_very_long_name_is_a_concept(distill, people, tmp_path):
    (people / "anna").rename(people / ("ö" * 120))
    assert distill(4)[0] == 0
    assert "ö" * 120 in open_lora_targets(tmp_path / "run" / "targets").ids
