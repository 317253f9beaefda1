"""Counts that follow from the folder of pictures."""

import pytest

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.cli.config_checks import check, check_batches
from hyperlora_jax.cli.config_counts import settle
from hyperlora_jax.errors import UserError
from tests.user_world import PEOPLE, write_people


@pytest.fixture(name="people", scope="module")
def _people(tmp_path_factory):
    return write_people(tmp_path_factory.mktemp("people") / "people")


def settled(folder, *overrides, command="train", config="my_pictures", devices=2):
    given = [f"--config.{value}" for value in (f"data.source={folder}", "base=x", *overrides)]
    config = load_config(config, given)
    lines = settle(config, command, devices)
    check(config, command, "my_pictures")
    check_batches(config, devices)
    return config, lines


def folder_of(tmp_path, count):
    return write_people(tmp_path / str(count), {f"s{k}": (2, (16, 16)) for k in range(count)})


@pytest.mark.parametrize(
    ("subjects", "trained", "batch"),
    [(1, 1, 2), (2, 2, 2), (3, 2, 2), (6, 5, 4), (10, 8, 8), (30, 24, 16)],
)
def test_all_but_a_fifth_are_trained_on(subjects, trained, batch, tmp_path):
    config, lines = settled(folder_of(tmp_path, subjects))
    assert config.data.num_identities == trained
    assert config.distill.num_concepts == trained
    assert config.train.batch_size == batch
    assert config.train.num_steps == 1000
    assert {"data.num_identities", "train.batch_size", "train.num_steps"} <= set(config.given)
    said = f"{subjects} subjects, {trained} to train on, {subjects - trained or 'none'} held out"
    assert said in lines[0]
    assert ("nothing can be evaluated" in lines[0]) == (subjects < 3)


def test_what_was_given_is_kept(people):
    config, _ = settled(people, "data.num_identities=3", "train.batch_size=2", "train.num_steps=9")
    assert config.data.num_identities == 3
    assert (config.train.batch_size, config.train.num_steps) == (2, 9)


def test_any_config_adapts_to_a_small_folder(people):
    config, _ = settled(people, config="avatars")
    assert config.data.num_identities == len(PEOPLE) - 1
    assert config.distill.num_concepts == len(PEOPLE) - 1
    assert config.train.images_per_subject == 4  # anna has two: hers are repeated
    assert (config.train.batch_size, config.train.num_steps) == (16, 6000)
    config, _ = settled(people, config="finetune_unet", command="pretrain")
    assert config.data.num_identities == len(PEOPLE)


@pytest.mark.parametrize("key", ["data.num_identities", "distill.num_concepts"])
def test_too_many_are_refused_by_their_flag(key, people):
    with pytest.raises(UserError, match=rf"--config.{key}=7: .* 6 subjects"):
        settled(people, f"{key}=7", command="distill")


def test_drawn_worlds_keep_their_counts():
    config = load_config("avatars")
    assert settle(config, "train", 2) == []
    assert config.data.num_identities == 2048


def test_photographs_with_the_shipped_encoder_are_warned_about(people, capsys):
    settled(people)
    assert "encoder knows drawings only" in capsys.readouterr().err
    settled(people, "model.encoder=clip")
    assert capsys.readouterr().err == ""


def test_a_run_whose_counts_are_known_does_not_look_at_its_pictures(tmp_path):
    counts = ("data.num_identities=3", "distill.num_concepts=3", "train.batch_size=2")
    counts += ("train.num_steps=9",)
    config, lines = settled(tmp_path / "not mounted yet", *counts)
    assert lines == [] and config.data.num_identities == 3
