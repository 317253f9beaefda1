"""Workdirs remember their config: what was given once need not be given again."""

import json

import pytest

from hyperlora_jax.cli.config import load_config
from hyperlora_jax.cli.main import main
from hyperlora_jax.cli.workdir_config import read_config, remembered, run_config
from hyperlora_jax.errors import UserError

AVATARS, PAPER = "configs/avatars.py", "configs/paper.py"
SOURCE, STEPS = "--config.data.source=pics", "--config.train.num_steps=7"


def begin(workdir, *overrides, file=AVATARS):
    """A first command that ends well."""
    config = run_config(file, workdir, overrides)
    with remembered(workdir, config):
        pass
    return config


def test_given_names_what_the_command_line_said():
    assert load_config(AVATARS).given == ()
    assert load_config(AVATARS, [STEPS, SOURCE]).given == ("data.source", "train.num_steps")


def test_the_workdir_alone_is_enough(tmp_path):
    begin(tmp_path, SOURCE, STEPS)
    config = run_config(None, tmp_path, ["--config.evaluate.num_identities=3"])
    expected = load_config(AVATARS, [SOURCE, STEPS, "--config.evaluate.num_identities=3"])
    assert config.to_dict() == expected.to_dict()
    assert isinstance(config.train.num_references, tuple)


def test_overrides_hold_until_they_are_given_anew(tmp_path, capsys):
    begin(tmp_path, SOURCE, STEPS)
    config = begin(tmp_path, "--config.train.num_steps=9")
    assert (config.data.source, config.train.num_steps) == ("pics", 9)
    assert f"remembered by {tmp_path}/config.json: data.source=pics\n" in capsys.readouterr().out
    assert run_config(AVATARS, tmp_path).train.num_steps == 9
    assert run_config(None, tmp_path).given == ("data.source", "train.num_steps")


def test_a_file_that_contradicts_the_pictures_is_refused(tmp_path):
    begin(tmp_path, SOURCE)
    other = tmp_path / "other.py"
    other.write_text(
        "from hyperlora_jax.cli.config import load_config\n"
        "def get_config():\n"
        f"    return load_config({AVATARS!r}, ['--config.data.style=lorelei'])\n"
    )
    with pytest.raises(UserError, match=r"data.style: .* begun with 'pixel-art', .* has 'lorelei'"):
        run_config(other, tmp_path)
    config = run_config(other, tmp_path, ["--config.data.style=lorelei"])
    assert (config.data.source, config.data.style) == ("pics", "lorelei")


def test_another_model_is_refused_once_one_has_been_trained(tmp_path):
    begin(tmp_path)
    assert run_config(PAPER, tmp_path).model.generator == "latent_diffusion"
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"begun with 'raw', .*--config.data.gauge"):
        run_config(PAPER, tmp_path)


def test_a_refused_first_run_leaves_nothing(tmp_path):
    workdir = tmp_path / "run"
    config = run_config(AVATARS, workdir)
    with pytest.raises(UserError), remembered(workdir, config):
        assert read_config(workdir) is not None  # from before the first work on
        raise UserError("refused")
    assert not workdir.exists()
    assert main(["train", "--config", AVATARS, "--workdir", str(workdir), "--config.base=no"]) == 2
    assert not workdir.exists()


def test_a_refused_later_run_changes_nothing(tmp_path):
    begin(tmp_path, STEPS)
    config = run_config(AVATARS, tmp_path, [SOURCE])
    with pytest.raises(UserError), remembered(tmp_path, config):
        raise UserError("refused")
    assert run_config(AVATARS, tmp_path).data.source == "avatars"


def test_what_the_training_loop_wrote_is_kept(tmp_path):
    config = begin(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"facts": {"base": "x"}, "config": config.to_dict()}))
    begin(tmp_path, STEPS)
    assert json.loads(file.read_text())["facts"] == {"base": "x"}
    assert read_config(tmp_path).train.num_steps == 7


@pytest.mark.parametrize("text", ["{", "{}", "", "[]", '{"config": [1]}', '{"config": 3}', '"x"'])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json: found no JSON object with a .config."):
        run_config(AVATARS, tmp_path)


def test_without_either_the_flag_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^--config: expected a config file, as .* has no"):
        run_config(None, tmp_path)
