"""Going on with a run under other settings: said, refused or done, never with advice that destroys
a sound checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from toy_task import fit_toy

from hyperlora_jax.cli.main import run_command
from hyperlora_jax.errors import UserError
from tests import user_world

RATE = {"learning_rate": 1e-2, "warmup_steps": 2}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ema_decay": None}, "was made with ema_decay = 0.9, this run has ema_decay = None"),
        (
            {"optimizer": {**RATE, "clip_norm": None}},
            "optimizer.clip_norm = 1.0, this run has optimizer.clip_norm = None",
        ),
        (
            {"optimizer": {**RATE, "clip_norm": 1.0, "name": "muon"}},
            "was made with optimizer.name = 'adamw', this run has optimizer.name = 'muon'",
        ),
    ],
)
def test_settings_that_shape_the_state_are_named_with_both_values(tmp_path, settings, named):
    fit_toy(tmp_path, num_steps=5, optimizer={**RATE, "clip_norm": 1.0})
    for change in (lambda meta: None, lambda meta: meta.pop("settings")):  # and of an older run
        file = tmp_path / "checkpoints" / "5" / "meta" / "metadata"
        meta = json.loads(file.read_text())
        change(meta)
        file.write_text(json.dumps(meta))
        given = {"optimizer": {**RATE, "clip_norm": 1.0}, **settings}
        with pytest.raises(UserError) as raised:
            fit_toy(tmp_path, **given)
        text = str(raised.value)
        assert text.endswith("; keep the setting, or use another workdir")
        assert "delete" not in text and "\n" not in text
        if "settings" in meta:
            assert named in text
        else:
            assert "is sound, but of other settings than this run's train." in text
    fit_toy(tmp_path, optimizer={**RATE, "clip_norm": 1.0})  # nothing was lost


def test_other_changes_are_said_and_the_run_goes_on(tmp_path, capsys):
    fit_toy(tmp_path, num_steps=5)
    given = {"optimizer": {**RATE, "learning_rate": 2e-2}, "ema_decay": 0.8, "seed": 3}
    fit_toy(tmp_path, **given, progress=True)
    assert [line for line in capsys.readouterr().out.splitlines() if "was" in line] == [
        "toy: ema_decay is 0.8 from step 5 on, was 0.9",
        "toy: optimizer.learning_rate is 0.02 from step 5 on, was 0.01",
        "toy: seed is 3 from step 5 on, was 0",
    ]


def test_fewer_steps_are_refused_and_equal_ones_are_done(tmp_path, capsys):
    fit_toy(tmp_path, num_steps=5)
    with pytest.raises(UserError, match="checkpoints/5: the run is at step 5, num_steps is 4; ex"):
        fit_toy(tmp_path, num_steps=4)
    fit_toy(tmp_path, num_steps=5, progress=True)
    assert capsys.readouterr().out == "toy: already at step 5\n"


@pytest.mark.slow
def test_the_command_goes_on_when_everything_moved_and_says_what_changed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    user_world.write_base(tmp_path / "base")
    user_world.write_people(tmp_path / "people")
    configs = Path(__file__).parents[2] / "configs"

    def train(steps, base="base", people="people", *more):
        flags = {
            "base": tmp_path / base, "data.source": tmp_path / people, "data.num_identities": 4,
            "train.num_steps": steps, "train.batch_size": 2, "train.images_per_subject": 1,
            "train.checkpoint_every_steps": 1, "train.log_every_steps": 1,
        }  # fmt: skip
        given = [f"--config.{name}={value}" for name, value in flags.items()]
        code = run_command(
            "train",
            ["--config", str(configs / "avatars.py"), "--workdir", str(tmp_path / "run"),
             *given, *user_world.SHRUNK, *more],
        )  # fmt: skip
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()[-1] if said.err else ""

    assert train(2)[0] == 0
    code, out, _ = train(2)
    assert code == 0 and "already at step 2" in out
    code, _, error = train(1)
    assert code == 2 and "the run is at step 2, num_steps is 1" in error
    code, _, error = train(3, "base", "people", "--config.train.ema_decay=None")
    assert code == 2 and "ema_decay = 0.998, this run has ema_decay = None" in error

    (tmp_path / "base").rename(tmp_path / "base2")
    (tmp_path / "people").rename(tmp_path / "people2")
    code, _, error = train(3, "base2", "people2", "--config.train.ema_decay=0.998")
    assert code == 0, error
    shutil.copy(tmp_path / "people2" / "bert" / "0.png", tmp_path / "people2" / "anna" / "0.png")
    code, _, error = train(4, "base2", "people2")
    assert code == 2 and "1 of its 4 subjects have other pictures than those that" in error
    assert error.endswith("first 'anna' (other contents or captions); use another workdir")
    shutil.copy(tmp_path / "people2" / "bert" / "0.png", tmp_path / "people2" / "anna" / "2.png")
    assert "first 'anna' (2 pictures, now 3)" in train(4, "base2", "people2")[2]
    (tmp_path / "people2" / "anna").rename(tmp_path / "people2" / "zoe")
    code, _, error = train(4, "base2", "people2")
    assert code == 2 and "on: 1 new (first 'emil') and 1 gone (first 'anna'); use" in error
    (tmp_path / "run" / "pictures.json").unlink()  # of an older version
    assert "checkpoints/3 was made with data.pictures = '" in train(4, "base2", "people2")[2]
