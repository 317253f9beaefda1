"""A base with LoRA inputs equals diffusers with peft, row by row, in every family and form."""

import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from hyperlora_jax.cli.main import main
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora.vectorize import flatten
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.runtime.base_export import LAYOUT, export_base
from hyperlora_jax.runtime.lora_unet import BadInput, LoraUNet
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from tests.lora_files.conftest import random_lora
from tests.stable_diffusion.conftest import tiny_unet_config, torch_unet
from tests.user_world import write_base

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu_inference.md"
RANK = 3
PRESETS = {"sd1": "all", "sd2": "attn-qkvo", "sdxl": "attn-ff"}
UNETS = {
    "sd1": tiny_unet_config(),
    "sd2": tiny_unet_config(use_linear_projection=True, attention_head_dim=[2, 4]),
    "sdxl": tiny_unet_config(
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=[1, 2],
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=20 + 6 * 6,
    ),
}


def inputs_of(unet, rows, height, width, tokens):
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    inputs = {
        "sample": normal(rows, 4, height, width),
        "timestep": torch.linspace(1, 900, rows).round(),
        "encoder_hidden_states": normal(rows, tokens, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type:
        inputs["text_embeds"] = normal(rows, 20)
        inputs["time_ids"] = torch.full((rows, 6), 64.0)
    return inputs


def by_peft(unet, strengths, inputs):
    """Row by row: the prediction of diffusers with adapter "own<k>" at the strength of row k."""
    rows = []
    for k, strength in enumerate(strengths):
        unet.set_adapters([f"own{k}"], [strength])
        one = {name: value[k : k + 1] for name, value in inputs.items()}
        added = {name: one.pop(name) for name in ("text_embeds", "time_ids") if name in one}
        with torch.no_grad():
            rows.append(unet(**one, added_cond_kwargs=added, return_dict=False)[0])
    return torch.cat(rows)


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


# The exporters work for half a minute.
FAST = (("sd1", "torch-export"), ("sdxl", "onnx"))


@pytest.mark.parametrize("family, format", [
    pytest.param(family, format, marks=[pytest.mark.slow] * ((family, format) not in FAST))
    for family in UNETS for format in ("torch-export", "onnx")
])  # fmt: skip
def test_every_row_has_its_lora(family, format, tmp_path):
    unet = torch_unet(UNETS[family])
    unet.save_pretrained(tmp_path / "base" / "unet")
    spec = export_base(str(tmp_path / "base"), tmp_path / "out", format, PRESETS[family], RANK)
    graph = LoraUNet(tmp_path / "out")
    vectors, strengths = [], [1.0, 0.5, 0.0, -0.7]
    for k in range(4):
        lora, file = random_lora(spec, k), tmp_path / f"{k}.safetensors"
        save_lora(file, lora, spec, "diffusers", "float32", family)
        with warnings.catch_warnings():  # peft warns of every adapter but the first
            warnings.simplefilter("ignore")
            unet.load_lora_adapter(load_file(file), prefix="unet", adapter_name=f"own{k}")
        other = save_lora(
            tmp_path / f"{k}.kohya.safetensors", lora, spec, "kohya", "float32", family, None, 1
        )
        vectors.append(graph.vector((file, other)[k % 2]))
    stacked = torch.stack(vectors)
    for height, width, tokens in ((8, 8, 7), (12, 16, 3)):
        inputs = inputs_of(unet, 4, height, width, tokens)
        found = graph(stacked, torch.tensor(strengths), **inputs)
        expected = by_peft(unet, strengths, inputs)
        assert all(error(*pair) <= 1e-4 for pair in zip(found, expected, strict=True))
    plain = by_peft(unet, [0.0] * 4, inputs)
    assert error(found[2], plain[2]) <= 1e-5  # strength 0 is the base
    assert all(error(found[k], plain[k]) > 1e-2 for k in (0, 1, 3))
    alone = {name: value[1:2] for name, value in inputs.items()}
    assert error(graph(stacked[1:2], torch.tensor(strengths[1:2]), **alone)[0], found[1]) <= 1e-5


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a base, its exported UNet ("served") and the LoRAs of two people."""
    folder = tmp_path_factory.mktemp("people")
    root = write_base(folder / "base")
    asked = ["--format", "torch-export", "--lora", "attn-qkvo", "--rank", "2"]
    assert main(["export", str(root), "--out", str(folder / "served"), *asked]) == 0
    spec = StableDiffusion.outline(root).lora_spec("attn-qkvo", 2)
    for k, name in enumerate(("anna", "ben")):
        save_lora(folder / f"{name}.safetensors", random_lora(spec, k), spec)
    return folder


def pipeline(root):
    pipe = DiffusionPipeline.from_pretrained(root)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_layout_is_that_of_our_vectors(served):
    layout = json.loads((served / "served" / LAYOUT).read_text())
    spec = StableDiffusion.outline(served / "base").lora_spec("attn-qkvo", 2)
    assert layout["numbers"] == spec.num_parameters and layout["base_hash"]
    vector = LoraUNet(served / "served").vector(served / "anna.safetensors")
    lora, spec = load_lora(served / "anna.safetensors")
    np.testing.assert_allclose(vector, flatten(lora, spec), rtol=1e-6)


def test_the_folder_draws_by_itself(served, tmp_path, capsys, monkeypatch):
    """Two people in one batch, without this package; what does not belong to the base is one line
    and exit code 2."""
    root, files = served / "base", [str(served / f"{n}.safetensors") for n in ("anna", "ben")]
    draw = runpy.run_path(str(served / "served" / "lora_unet.py"))["main"]
    fixed = ["--base", str(root), "--prompt", "cat on dog", "--num_steps", "2", "--out"]
    fixed += [str(tmp_path / "pictures"), "--strength", "1", "0.5", "--seed", "4", "--lora"]
    assert draw([*fixed, *files]) == 0
    for k, (file, strength) in enumerate(zip(files, (1.0, 0.5), strict=True)):
        pipe = pipeline(root)
        pipe.load_lora_weights(served, weight_name=Path(file).name, adapter_name="one")
        pipe.set_adapters(["one"], [strength])
        noise = torch.Generator().manual_seed(4)
        expected = pipe("cat on dog", num_inference_steps=2, generator=noise).images[0]
        picture = Image.open(tmp_path / "pictures" / f"{Path(file).stem}_{k:02d}.png")
        difference = np.abs(np.float32(picture) - np.float32(expected))
        assert difference.max() <= 2 < np.std(np.float32(picture))
    outline = StableDiffusion.outline(root)
    spec, more = outline.lora_spec("attn-qkvo", 2), outline.lora_spec("attn-ff", 2)
    foreign = LoraSpec((LoraSite(spec.sites[0].path, 7, 16, 2),))
    graph = LoraUNet(served / "served")  # reading it takes seconds
    monkeypatch.setitem(draw.__globals__, "LoraUNet", lambda **_: graph)
    monkeypatch.setitem(draw.__globals__, "BadInput", BadInput)
    (tmp_path / "text.safetensors").write_text("no tensors")
    capsys.readouterr()
    for file, words in (
        (random_file(tmp_path / "wide", spec.with_rank(3)), "has rank 3, the graph takes 2"),
        (random_file(tmp_path / "foreign", foreign), "LoRA of another base"),
        (random_file(tmp_path / "more", more), "the graph takes layers of 'attn-qkvo'"),
        (tmp_path / "text.safetensors", "no readable .safetensors file"),
        (root / "unet" / "diffusion_pytorch_model.safetensors", "belongs to no LoRA"),
    ):
        assert draw([*fixed, files[0], str(file)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and str(file) in line
    assert draw([*fixed, files[0]]) == 2
    assert "2 strengths for 1 LoRAs" in capsys.readouterr().err


def test_the_example_of_the_document_runs(served, monkeypatch):
    (block,) = re.findall(r"```python\n([^`]*from lora_unet[^`]*)```", DOCUMENT.read_text())
    monkeypatch.chdir(served)
    monkeypatch.setattr(sys, "path", sys.path[:])
    names = {"pipe": pipeline("base"), "LORAS": "."}
    exec(compile(block, str(DOCUMENT), "exec"), names)
    (anna, ben), (other_ben, other_anna) = names["both"], names["others"]
    assert len({picture.tobytes() for picture in (anna, ben, other_anna, other_ben)}) == 4


def random_file(path, spec):
    return save_lora(path.with_suffix(".safetensors"), random_lora(spec), spec, "diffusers")


@pytest.mark.parametrize(
    "given, words",
    [
        (["nowhere", "--format", "onnx", "--lora", "w2w"], "nowhere: not a directory"),
        (["BASE/vae", "--format", "onnx", "--lora", "w2w"], "unet: folder not found"),
        (["BASE", "--format", "onnx", "--lora", "q"], "LoRA preset 'q' is unknown"),
        (["BASE", "--format", "onnx", "--lora", "w2w", "--rank", "0"], "LoRA rank is 0"),
        (["BASE", "--format", "torch-export"], "--format torch-export needs --lora PRESET"),
        (["BASE", "--lora", "w2w"], "--format is None, expected onnx or torch-export"),
        (["BASE", "--format", "diffusers", "--lora", "w2w"], "expected onnx or torch-export"),
        (["BASE", "--rank", "4"], "--rank goes with --lora PRESET"),
        (["BASE", "--format", "onnx", "--lora", "w2w", "--step", "3"], "--step: is of what was"),
    ],
)
def test_what_cannot_be_exported_is_one_line(served, tmp_path, given, words, capsys):
    given = [word.replace("BASE", str(served / "base")) for word in given]
    assert main(["export", *given, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()
