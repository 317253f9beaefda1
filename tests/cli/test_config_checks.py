"""Every value of every config is checked before any work."""

import time
from pathlib import Path

import pytest

from hyperlora_jax.cli.compile import _config_batch
from hyperlora_jax.cli.config import flatten, load_config
from hyperlora_jax.cli.config_checks import NEEDS, check, check_batches
from hyperlora_jax.cli.config_rules import rule_of
from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.parallel.topology import parse

CONFIGS = sorted(Path("configs").glob("*.py"))
AVATARS = "configs/avatars.py"


def command_of(config):
    """A command that takes a config."""
    return next(
        name for name in ("pretrain", "train", "distill")
        if all(section in config for section in NEEDS[name][0])
    )  # fmt: skip


def keys():
    """(config, key, value) of every key of any config, once."""
    found = {}
    for path in CONFIGS:
        for key, value in flatten(load_config(path)).items():
            found.setdefault(key, (path, key, value))
    return list(found.values())


KEYS = keys()
CHOICES = [(path, key) for path, key, _ in KEYS if (rule := rule_of(key)) and rule.choices]


@pytest.mark.parametrize(("path", "key", "value"), KEYS, ids=[key for _, key, _ in KEYS])
def test_every_key_has_a_rule_that_takes_its_value(path, key, value):
    rule = rule_of(key)
    assert rule is not None, f"{path}: {key} has no row in cli/config_rules.py"
    assert rule.accepts(value)


def test_enough_is_enumerated():
    names = {key for _, key in CHOICES}
    assert names >= {
        "model.network.head", "model.network.down", "model.network.conditioning", "data.gauge",
        "distill.recipe.schedule", "train.optimizer.schedule", "generate.sampler", "model.preset",
        "generate.format", "model.generator", "model.diffusion.prediction", "distill.splits",
        "model.diffusion.denoiser", "train.remat", "train.dtype", "distill.preset", "data.style",
        "evaluate.linear_combination.per", "model.baseline.space", "task", "export.dtype",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "key"), CHOICES, ids=[key for _, key in CHOICES])
def test_a_typo_ends_with_the_list_of_what_is_allowed(path, key, tmp_path, capsys):
    command = command_of(load_config(path))
    allowed = rule_of(key).choices
    typo = allowed[0] + "e"
    workdir = tmp_path / "run"
    arguments = ["--config", str(path), "--workdir", str(workdir), f"--config.{key}={typo}"]
    assert main([command, *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert f"--config.{key}={typo}: expected one of {', '.join(allowed)}" in said
    assert "\n" not in said
    assert not workdir.exists()


def numbers():
    """(config, key, a number that cannot be) of every number; none may be -5 or nan."""
    for path, key, value in KEYS:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield path, key, -5 if isinstance(value, int) else "nan"


@pytest.mark.parametrize(("path", "key", "bad"), list(numbers()), ids=[k for _, k, _ in numbers()])
def test_no_number_may_be_anything(path, key, bad):
    value = float(bad) if bad == "nan" else bad
    assert not rule_of(key).accepts(value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.num_steps=-5", "at least 1"),
        ("train.optimizer.learning_rate=-1", "above 0"),
        ("train.optimizer.learning_rate=0", "above 0"),
        ("train.batch_size=0", "at least 1"),
        ("distill.num_slots=0", "at least 1"),
        ("train.log_every_steps=0", "at least 1"),
        ("train.checkpoint_every_steps=0", "at least 1"),
        ("train.vae.batch_size=0", "at least 1"),
        ("train.num_references=(0,0)", "fewest, most"),
        ("train.num_references=(3,2)", "fewest, most"),
        ("train.objectives.end_to_end=-1", "at least 0"),
        ("evaluate.strengths=()", "one or more"),
        ("evaluate.methods=('generatd',)", "generated"),
        ("model.condition_dropout=1.0", "below 1"),
        ("mesh.data=0", "-1 or an integer"),
        ("data.source=", "folder of pictures"),
    ],
)
def test_values_that_cannot_be_are_refused_at_once(override, reason, tmp_path, capsys):
    start = time.perf_counter()
    workdir = tmp_path / "run"
    work = ["--config", AVATARS, "--workdir", str(workdir), f"--config.{override}"]
    assert main(["train", *work]) == 2
    said = capsys.readouterr().err.strip()
    assert f"--config.{override.partition('=')[0]}" in said
    assert reason in said
    assert "\n" not in said
    assert not workdir.exists()
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("override", "value"),
    [("evaluate.strengths=(1.0)", (1.0,)), ("evaluate.strengths=2", (2,)),
     ("evaluate.methods=generated", ("generated",)), ("distill.encoders=[]", ())],
)  # fmt: skip
def test_one_value_stands_for_a_tuple_of_one(override, value):
    config = load_config(AVATARS, [f"--config.{override}"])
    assert flatten(config)[override.partition("=")[0]] == value
    check(config, "train", AVATARS)


@pytest.mark.parametrize(
    ("command", "path", "reason"),
    [
        ("train", "configs/tiny_sd.py", "of `hyperlora train` .found one of `hyperlora pretrain`."),
        ("distill", "configs/tiny_sd.py", "has no distill, expected"),
        ("evaluate", "configs/tiny_sd.py", "expected a config of `hyperlora evaluate`"),
        ("train", "configs/distill_w2w.py", "has no model.*e.g. configs/avatars.py"),
        ("pretrain", AVATARS, "has no task, .*found one of `hyperlora distill`"),
        ("compile", "configs/tiny_sd.py", "has no base model"),
    ],
)
def test_a_config_of_another_command_is_named(command, path, reason):
    with pytest.raises(UserError, match=reason):
        check(load_config(path), command, path)


def test_compile_takes_a_batch_as_training_does():
    topology = parse("v5e-4")

    def per_device(*overrides):
        return _config_batch(load_config(AVATARS, [f"--config.{v}" for v in overrides]), topology)

    assert per_device() == 16 // 4
    assert per_device("train.batch_per_device=True") == 16
    assert per_device("mesh.tensor=2") == 16 // 2
    with pytest.raises(UserError, match=r"batch_size=6: cannot be shared out by the 4 devices"):
        per_device("train.batch_size=6")
    with pytest.raises(UserError, match=r"batch_size: is left open"):
        per_device("train.batch_size=None")


def test_some_objective_is_wanted():
    config = load_config(AVATARS, ["--config.train.objectives.end_to_end=0"])
    with pytest.raises(UserError, match=r"--config.train.objectives: all are 0, .* end_to_end"):
        check(config, "train", AVATARS)


def test_batches_that_the_mesh_cannot_split_are_refused_before_work():
    config = load_config(AVATARS, ["--config.train.batch_size=5"])
    with pytest.raises(UserError, match=r"train.batch_size=5: .* multiple of 2, .* e.g. 4 or 6"):
        check_batches(config, 2)
    check_batches(config, 1)
    check_batches(load_config(AVATARS, ["--config.model.generator=ridge"]), 5)
    with pytest.raises(UserError, match=r"train.vae.batch_size=32"):
        wide = ["--config.train.batch_size=48", "--config.model.generator=latent_diffusion"]
        check_batches(load_config(AVATARS, wide), 24)
    with pytest.raises(UserError, match=r"--config.mesh data=3"):
        check_batches(load_config(AVATARS, ["--config.mesh.data=3"]), 2)
