"""The embedded base goes by its name in every command that takes a base."""

import jax
import pytest

from hyperlora_jax.cli.main import main
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import load_lora, read_metadata, save_lora
from hyperlora_jax.stable_diffusion.embedded import load_base

NAME = "tiny-sd"


@pytest.fixture(name="lora", scope="module")
def _lora(tmp_path_factory):
    sd = load_base(NAME)
    spec = sd.lora_spec("attn-qkvo", 2)
    lora = jax.device_get(factors.init(jax.random.key(0), spec))
    file = tmp_path_factory.mktemp("lora") / "anna.safetensors"
    texts = {"base": NAME, "base_hash": sd.base_hash}
    return save_lora(file, lora, spec, family="sd1", metadata=texts)


def run(*arguments):
    assert main([str(item) for item in arguments]) == 0, arguments


def test_inspect(capsys):
    run("inspect", NAME)
    shown = capsys.readouterr().out
    assert load_base(NAME).base_hash in shown and "text_encoder " in shown


def test_convert_is_verified_against_it(lora, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run("convert", lora, "--out", out, "--format", "diffusers", "--base", NAME, "--verify")
    assert "no missing and no unexpected key" in capsys.readouterr().out


def test_a_merged_model_and_what_it_learned(lora, tmp_path):
    run("merge", lora, "--into", NAME, "--out", tmp_path / "tuned")
    out = tmp_path / "learned.safetensors"
    options = ("--rank", 2, "--preset", "attn-qkvo", "--dtype", "float32")
    run("extract", NAME, tmp_path / "tuned", "--out", out, *options)
    assert load_lora(out, load_base(NAME))[1].max_rank == 2


def test_import(lora, tmp_path, capsys):
    run("import", lora, "--base", NAME, "--out", tmp_path / "targets", "--workers", 1)
    assert (tmp_path / "targets" / "metadata.json").exists()


def test_names_in_headers_are_names_of_bases(lora):
    assert read_metadata(lora)["hyperlora.base"] == NAME
