import itertools
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from hyperlora_jax.cli import arguments as cli_arguments
from hyperlora_jax.cli import convert as convert_command
from hyperlora_jax.cli import inspect_lora
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.factors import is_site
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import compatibility, load_lora, read_metadata, save_lora
from hyperlora_jax.lora_files.base_files import read_base_model
from hyperlora_jax.lora_files.compatibility import inspect_lora as inspect
from hyperlora_jax.lora_files.convert import convert_file, convert_folder, find_loras, open_base
from hyperlora_jax.lora_files.safetensors_io import write
from hyperlora_jax.lora_files.writing import FORMATS
from tests.lora_files.conftest import random_lora, spec_of
from tests.lora_files.foreign import random_tensors
from tests.lora_files.test_round_trip import contents, deltas

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
SPEC = LoraSpec(
    (
        LoraSite(BLOCK + "attn1.to_q", 8, 8, 2),
        LoraSite(BLOCK + "attn2.to_k", 6, 8, 2),
        LoraSite("down_blocks.0.resnets.0.conv1", 8, 8, 2, "conv", (3, 3)),
    )
)


def parse(module, *arguments):
    return cli_arguments.parse("convert", "", module, [str(item) for item in arguments])


@pytest.fixture(scope="module")
def base(tmp_path_factory, sd1_modules):
    folder = tmp_path_factory.mktemp("base")
    for name, module in sd1_modules.items():
        module.save_pretrained(folder / name)
    return folder


def name_of(format):
    return format if format in ("peft", "weights2weights") else f"{format}.safetensors"


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_all_pairs_keep_every_delta(tmp_path, first, second):
    lora = random_lora(SPEC)
    source = save_lora(
        tmp_path / name_of(first), lora, SPEC, first, "float32", metadata={"seed": 3}
    )
    done = convert_file(source, tmp_path / name_of(second), second, "float32")
    back, spec = load_lora(done.target)
    assert spec == SPEC
    # Only the 27 of weights2weights rounds, by an ulp.
    exact = "weights2weights" not in (first, second)
    for path, wanted in deltas(lora, SPEC).items():
        error = np.abs(deltas(back, spec)[path] - wanted).max()
        assert error <= (0 if exact else 3e-7 * np.abs(wanted).max())
    assert read_metadata(done.target)["hyperlora.seed"] == "3"
    again = convert_file(done.target, tmp_path / "again" / name_of(second), second, "float32")
    assert contents(done.target) == contents(again.target)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_dtypes_move_by_an_ulp_at_most(tmp_path, dtype):
    """Every pair of formats; a kohya file whose alphas are no powers of two is the start."""
    spec = SPEC.with_rank(3)
    alphas = {site.path: np.array(1 + i, np.float32) for i, site in enumerate(spec)}
    write(tmp_path / "start", random_tensors(spec, "kohya", "sd1", 0, dtype, alphas)[0], {})
    name = ml_dtypes.finfo(dtype).dtype.name
    sources = [tmp_path / "start"]
    for format in FORMATS:
        sources.append(convert_file(sources[0], tmp_path / format, format, name).target)
    for source, format in itertools.product(sources, FORMATS):
        before, _ = load_lora(source)
        after, _ = load_lora(convert_file(source, tmp_path / "out" / format, format, name).target)
        for pair, new in zip(
            *(jax.tree.leaves(tree, is_leaf=is_site) for tree in (before, after)), strict=True
        ):
            # The power of two that balances a pair is no rounding.
            power = 2.0 ** np.round(np.log2(np.abs(pair["up"]).max() / np.abs(new["up"]).max()))
            for side, moved in (("down", 1 / power), ("up", power)):
                bits = ml_dtypes.finfo(dtype).nmant
                ulp = 2.0 ** (np.floor(np.log2(np.abs(pair[side]))) - bits)
                assert (np.abs(new[side] * moved - pair[side]) <= ulp).all(), (source, format)


def test_a_folder_in_parallel_keeps_its_structure_and_names_failures(tmp_path):
    source = tmp_path / "in"
    for i, name in enumerate(("a.safetensors", "deep/b.safetensors")):
        save_lora(source / name, random_lora(SPEC, i), SPEC, "kohya")
    save_lora(source / "c", random_lora(SPEC, 2), SPEC, "peft")
    save_lora(source / "d", random_lora(SPEC, 3), SPEC, "diffusers")
    (source / "notes.txt").write_text("x")
    (source / "bad.safetensors").write_bytes(b"x" * 40)
    assert [p.name for p in find_loras(source)] == [
        "a.safetensors", "bad.safetensors", "c", "pytorch_lora_weights.safetensors",
        "b.safetensors",
    ]  # fmt: skip
    done = convert_folder(source, tmp_path / "out", "kohya", num_workers=2)
    assert [bool(result.error) for result in done] == [False, True, False, False, False]
    assert "bad.safetensors" in done[1].error
    out = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.s*"))
    assert out == ["a.safetensors", "c.safetensors", "d.safetensors", "deep/b.safetensors"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no LoRA file"):
        find_loras(tmp_path / "none")


def test_the_command_converts_verifies_and_reports(tmp_path, base, sd1_modules, capsys):
    spec = spec_of(sd1_modules, "attn-qkvo", rank=2)
    lora = random_lora(spec)
    source = save_lora(tmp_path / "a.safetensors", lora, spec, "diffusers", "float32")
    target = tmp_path / "b.safetensors"
    arguments = (source, "--out", target, "--format", "kohya", "--dtype", "float32")
    args = parse(convert_command, *arguments, "--base", base, "--verify")
    assert convert_command.run(args) == 0
    printed = capsys.readouterr().out
    assert "no missing and no unexpected key" in printed
    assert "ComfyUI" in printed
    assert deltas(load_lora(target)[0], spec).keys() == deltas(lora, spec).keys()
    with pytest.raises(UserError, match="--verify needs --base DIR"):
        convert_command.run(parse(convert_command, *arguments, "--verify"))
    with pytest.raises(UserError, match="--workers is 0"):
        convert_command.run(parse(convert_command, *arguments, "--workers", 0))


def test_the_command_takes_folders(tmp_path, capsys):
    save_lora(tmp_path / "in" / "a.safetensors", random_lora(SPEC), SPEC)
    args = parse(
        convert_command, tmp_path / "in", "--out", tmp_path / "out", "--format", "diffusers"
    )
    assert convert_command.run(args) == 0
    assert (tmp_path / "out" / "a.safetensors").exists()
    (tmp_path / "in" / "bad.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 2 LoRAs could not be converted"):
        convert_command.run(args)
    assert "empty file" in capsys.readouterr().out


def test_the_base_is_read_from_headers(tmp_path, base, sd1_modules):
    model = read_base_model(base)
    assert (model.family, model.layers_per_block) == ("sd1", 2)
    wanted = {site.path: site for site in spec_of(sd1_modules, [""], 1)}
    assert {path: model.layers[path] for path in wanted} == wanted
    assert open_base("sdxl") == "sdxl"
    with pytest.raises(UserError, match="folder not found, expected the UNet"):
        open_base(str(tmp_path / "flux"))
    spec = LoraSpec((LoraSite(BLOCK + "attn1.to_q", 9, 9, 1),))
    path = save_lora(tmp_path / "a.safetensors", random_lora(spec), spec)
    with pytest.raises(UserError, match="9→9 in the file, 32→32 in the base"):
        convert_file(path, tmp_path / "b", "peft", base=model)


def test_a_vector_needs_a_base(tmp_path, base, sd1_modules):
    spec = spec_of(sd1_modules, "w2w", rank=1, text=False)
    folder = save_lora(tmp_path / "v", random_lora(spec), spec, "weights2weights", "float32")
    with pytest.raises(UserError, match="give --base DIR"):
        convert_file(folder / "weights.npy", tmp_path / "a.safetensors", "kohya")
    model = read_base_model(base)
    done = convert_file(
        folder / "weights.npy", tmp_path / "a.safetensors", "kohya", "float32", model
    )
    assert done.spec == spec
    assert load_lora(done.target)[1] == spec


def test_compatibility_follows_the_table(modules, family):
    spec = spec_of(modules)
    status = {
        form: {row.tool: row.status for row in compatibility.report(spec, family, form)}
        for form in ("kohya", "kohya-ldm", "diffusers", "old-diffusers", "comfy", "peft")
    }
    assert status["diffusers"]["diffusers"] == status["diffusers"]["diffusers 0.33"] == "full"
    assert status["diffusers"]["ComfyUI"] == "part"
    assert status["diffusers"]["kohya sd-scripts"] == status["diffusers"]["A1111"] == "none"
    assert status["comfy"]["diffusers"] == "none"
    assert status["comfy"]["ComfyUI"] == "full"
    assert status["peft"] == dict.fromkeys(compatibility.TOOLS, "none") | {"PEFT": "full"}
    portable = status["kohya-ldm" if family == "sdxl" else "kohya"]
    assert portable["PEFT"] == "none"
    for tool in ("diffusers", "diffusers 0.33", "kohya sd-scripts", "ComfyUI", "A1111"):
        assert portable[tool] == "full"
    if family == "sdxl":
        assert portable["stable-diffusion.cpp"] == "untested"
    else:
        assert portable["stable-diffusion.cpp"] == portable["LyCORIS"] == "full"
        assert status["kohya-ldm"]["diffusers"] == "none"
    rows = compatibility.report(spec, family, "diffusers")
    assert any("attention keys" in line for line in compatibility.lines(rows, len(spec)))


def test_edge_layers_and_partial_attention_are_reported():
    spec = LoraSpec(
        (
            LoraSite("conv_in", 4, 8, 1, "conv", (3, 3)),
            LoraSite("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 8, 8, 1),
        )
    )
    rows = {row.tool: row for row in compatibility.report(spec, "sdxl", "kohya-ldm")}
    assert rows["kohya sd-scripts"].lost == ("conv_in",)
    assert "q, k, v and out" in rows["A1111"].reason
    assert "layers outside attention" in rows["diffusers 0.33"].reason
    assert "without any out_proj" in rows["diffusers"].reason


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("old", "old-diffusers"),
        ("kohya", "kohya"),
        ("kohya-ldm", "kohya-ldm"),
        ("comfy", "comfy"),
        ("diffusers5", "diffusers"),
    ],
)
def test_forms_are_recognised(sd1_modules, form, wanted):
    spec = spec_of(sd1_modules, "attn-qkvo")
    if form == "diffusers5":
        spec = spec.component("text_encoder")
    tensors, _ = random_tensors(spec, form, "sd1")
    assert compatibility.form_of(tensors) == wanted


def test_inspect_prints_and_writes_everything(tmp_path, capsys):
    path = save_lora(tmp_path / "a.safetensors", random_lora(SPEC), SPEC, metadata={"seed": 5})
    args = parse(inspect_lora, path, "--sites", "--json", tmp_path / "report.json")
    assert inspect_lora.run(args) == 0
    printed = capsys.readouterr().out
    assert "kohya keys, sd1" in printed
    assert "hyperlora.seed = 5" in printed
    assert BLOCK + "attn1.to_q  8→8  rank 2" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    dense = deltas(load_lora(path)[0], SPEC)
    norm = np.sqrt(sum((value**2).sum() for value in dense.values()))
    assert abs(report["norm"] / norm - 1) < 1e-6
    for row in report["sites"]:
        sigma = np.linalg.svd(dense[row["path"]], compute_uv=False)[:2]
        np.testing.assert_allclose(row["singular_values"], sigma, rtol=1e-5)
    folder = save_lora(tmp_path / "w", random_lora(SPEC), SPEC, "weights2weights")
    assert inspect(folder)["form"] == "weights2weights"
    assert inspect(path, "sd2")["family"] == "sd2"


def test_uneven_alphas_are_noted(tmp_path):
    alphas = {SPEC.sites[0].path: np.array(1.0, np.float32)}
    tensors, _ = random_tensors(SPEC, "kohya", "sd1", alphas=alphas)
    write(tmp_path / "a.safetensors", tensors, {})
    assert any("alphas differ" in note for note in inspect(tmp_path / "a.safetensors")["notes"])
