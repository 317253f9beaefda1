"""`--print_config`: every key, with the comment that explains it."""

from hyperlora_jax.cli.config import flatten, load_config
from hyperlora_jax.cli.config_text import comments_of
from hyperlora_jax.cli.main import main


def test_every_key_is_there_with_its_comment(capsys):
    assert main(["train", "--config", "avatars", "--print_config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = [line.split(" = ")[0] for line in lines]
    assert sorted(keys) == sorted(flatten(load_config("avatars")))
    by_key = dict(zip(keys, lines, strict=True))
    assert by_key["data.style"].endswith("# or heads, fonts, or another style of the avatars")
    assert by_key["train.remat"].endswith("none, block, save_attention or full")
    assert by_key["model.network.down"].endswith("# or learned: one for all subjects")
    assert sum("  # " in line for line in lines) > 60


def test_comments_of_a_config_of_one_dictionary(capsys):
    assert main(["pretrain", "--config", "tiny_sd", "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "export.path = ''" in shown
    assert "# empty = WORKDIR/base" in shown


def test_overrides_and_the_workdir_are_shown(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"config": {"base": "x", "given": ["base"]}}')
    assert main(["train", "--workdir", str(tmp_path), "--print_config", "--config.base=y"]) == 0
    assert capsys.readouterr().out == "base = 'y'\n"
    assert main(["train", "--print_config"]) == 2
    assert "expected --config FILE, or --workdir" in capsys.readouterr().err


def test_a_comment_belongs_to_the_key_of_its_line():
    source = """
def train():
    section = {
        "a": 1,  # one
        "b": {"c": "# no", "d": 2},  # of b
        "e": {
            "f": (),  # of f
        },
    }
"""
    assert comments_of(source) == {"train.a": "one", "train.b": "of b", "train.e.f": "of f"}
