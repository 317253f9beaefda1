"""Arguments: one line and code 2 for wrong ones, before JAX is imported; help that helps."""

import importlib
import subprocess
import sys

import pytest

from hyperlora_jax.cli import arguments, convert
from hyperlora_jax.cli.main import COMMANDS, main
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.factors import zeros
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import save_lora

AVATARS = ["--config", "avatars", "--workdir", "nowhere"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["trian"], "did you mean train?"),
        (["train", *AVATARS, "--config.train.num_steps", "3"], "use --config.train.num_steps=3"),
        (["train", *AVATARS, "--train.num_steps=3"], "use --config.train.num_steps=3"),
        (["train", *AVATARS, "--num_steps=3"], "use --config.train.num_steps=3"),
        (["distill", *AVATARS, "--num_steps=3"], "use --config.distill.num_steps=3"),
        (["train", "--train.num_steps=3"], "values of the config are --config.train.num_steps=3"),
        (["train", *AVATARS, "--wrokdir=x"], "did you mean --workdir?"),
        (["train", *AVATARS, "--config.train.num_step=3"], "mean --config.train.num_steps?"),
        (["train", *AVATARS, "--config.learning_rate=1"], "--config.train.optimizer.learning_rate"),
        (["train", *AVATARS, "--config.train=3"], "is a section, expected a key of it"),
        (["train", "--config", "avatar", "--workdir", "x"], "did you mean avatars?"),
        (["train", "--config", "avatars"], "--workdir: expected a folder"),
        (["train", "--workdir", "nowhere"], "--config: expected a config file"),
        (["generate", "--checkpoint", "x", "--reference"], "expected at least one argument"),
        (["sample", "tiny-sd", "--prompt", "a", "--num_steps", "x"], "invalid int value: 'x'"),
        (["convert", "a", "--out", "b", "--format", "zip"], "invalid choice: 'zip'"),
        (["export", "runs/me", "--out", "b", "--to", "zip"], "invalid choice: 'zip'"),
        (
            ["compile", *AVATARS, "--topology", "v5e-4"],
            "unknown argument '--workdir'; compile reads its --config alone",
        ),
        (["inspect", "configs", "--frob"], "unrecognized arguments: --frob"),
        (["merge", "a=1", "--uot", "x"], "the following arguments are required: --out"),
        (["train", *AVATARS, "--workdir=hyperlora_jax/assets"], "lies in the installed package"),
        (
            ["convert", "a", "--out", "hyperlora_jax/x", "--format", "kohya"],
            "lies in the installed package",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(arguments, reason, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert reason in said
    assert "\n" not in said


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_an_example_and_the_commonest_keys(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"example:\n  hyperlora {name}" in shown
    if name in ("train", "distill", "evaluate", "pretrain"):
        assert "commonest keys:\n  --config." in shown
        assert "--print_config" in shown


def test_keys_of_the_help_are_keys(capsys):
    for name, config in (
        ("train", "my_pictures"), ("distill", "my_pictures"), ("evaluate", "my_pictures"),
        ("pretrain", "finetune_unet"),
    ):  # fmt: skip
        main([name, "--help"])
        text = capsys.readouterr().out.split("commonest keys:")[1].split("Any value")[0]
        keys = [word.split("=")[0] for word in text.split() if word.startswith("--config.")]
        main([name, "--config", config, "--print_config"])
        known = capsys.readouterr().out
        assert len(keys) > 3
        for key in keys:
            assert f"\n{key.removeprefix('--config.')} = " in f"\n{known}"


def test_arguments_are_parsed_without_jax(tmp_path):
    file = tmp_path / "lora.safetensors"
    spec = LoraSpec((LoraSite("mid_block.attentions.0.proj_in", 8, 4, 2),))
    save_lora(file, zeros(spec), spec)
    code = (
        "import sys; from hyperlora_jax.cli.main import COMMANDS, main\n"
        "assert main(['--help']) == 0 and 'numpy' not in sys.modules\n"
        "for name in COMMANDS: assert main([name, '--help']) == 0\n"
        "assert main(['train', '--config', 'avatars', '--print_config']) == 0\n"
        "assert main(['train', '--config', 'avatars', '--config.train.num_step=3']) == 2\n"
        "assert main(['convert', 'a', '--out', 'b', '--format', 'zip']) == 2\n"
        f"assert main(['inspect', {str(file)!r}]) == 0\n"
        "print({'jax', 'flax', 'transformers', 'torch', 'tqdm'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["set()"]), done.stderr


def test_homes_are_expanded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = ["train", "--config", "avatars", "--workdir=~/run", "--config.data.source=~/a,~/b"]
    assert main([*run, "--print_config", "--config.distill.prompt=no ~/path"]) == 0
    shown = capsys.readouterr().out
    assert f"data.source = '{tmp_path}/a,{tmp_path}/b'" in shown
    assert "distill.prompt = 'no ~/path'" in shown
    assert main(["generate", "--checkpoint", "~/none", "--reference", "~/a.png", "--out=x"]) == 2
    assert f"{tmp_path}/none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["a", "b", "--to", "peft"], ["a", "--to=peft", "b"], ["a", "--to", "peft", "b"]]
)
def test_words_of_older_versions_are_understood_and_replaced(given, capsys):
    parsed = arguments.parse("convert", "", convert, given)
    assert (parsed.source, parsed.out, parsed.format) == ("a", "b", "peft")
    said = capsys.readouterr().err
    assert "--to is called --format now" in said and "--out b now" in said


def test_two_outputs_are_one_too_many():
    with pytest.raises(UserError, match="two outputs: b and --out c"):
        arguments.parse("convert", "", convert, ["a", "b", "--out", "c", "--format", "peft"])
    with pytest.raises(UserError, match="required: --out"):
        arguments.parse("convert", "", convert, ["a", "--format", "peft"])


def test_the_folder_of_a_demo_means_the_workdir_in_it(tmp_path):
    (tmp_path / "demo" / "run" / "hypernetwork").mkdir(parents=True)
    place, inside = str(tmp_path / "demo"), str(tmp_path / "demo" / "run")
    for name, given in (
        ("generate", ["--checkpoint", place, "--reference", "a.png", "--out", "a.safetensors"]),
        ("serve", [place]),
        ("export", [place, "--out", str(tmp_path / "out")]),
        ("inspect", [place]),
        ("evaluate", ["--workdir", place]),
        ("demo", ["--workdir", place]),
    ):
        module = importlib.import_module(f"hyperlora_jax.cli.{name}")
        found = vars(arguments.parse(name, "", module, given))
        wanted = place if name == "demo" else inside
        assert wanted in (found.get("checkpoint"), found.get("workdir"), found.get("path")), name
