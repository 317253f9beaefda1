"""The file's own word about its family, and factors in forms that only some programs write."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import site_factors
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.lora_files.header import declared, tell

FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
HEADERS = {
    "sd1": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "sd2": {"ss_base_model_version": "sd_v2_v", "ss_v2": "True"},
    "sdxl": {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
}


def lora_file(path, layers, header=None, alpha=None):
    """A file of ones: {key stem: (shape of down, shape of up)}."""
    tensors = {}
    for stem, (down, up) in layers.items():
        tensors[f"{stem}.lora_down.weight"] = torch.ones(*down)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(*up)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, header)
    return path


def converted(source, to, tmp_path):
    target = tmp_path / f"out-{to}.safetensors"
    assert main(["convert", str(source), "--out", str(target), "--format", to]) == 0
    with safe_open(target, "pt") as file:
        return load_file(target), file.metadata()


@pytest.mark.parametrize("family", HEADERS)
@pytest.mark.parametrize("stem", [FIRST, TEXT])
def test_the_header_decides(family, stem, tmp_path, capsys):
    width = 768 if stem == TEXT else 320
    source = lora_file(
        tmp_path / "in.safetensors", {stem: ((4, width), (width, 4))}, HEADERS[family]
    )
    if family == "sdxl" and stem == FIRST:
        return  # SDXL has no attention there: sgm names cannot be told
    tensors, header = converted(source, "kohya", tmp_path)
    versions = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}
    assert header["ss_base_model_version"] == versions[family]
    if stem == TEXT:
        prefix = "lora_te1_" if family == "sdxl" else "lora_te_"
        assert all(key.startswith(prefix) for key in tensors)
    assert family in capsys.readouterr().out


def test_widths_come_before_the_form_of_proj_in(tmp_path):
    proj, key = (
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        FIRST.replace("attn1_to_q", "attn2_to_k"),
    )
    for width, form, family in ((768, (), "sd1"), (1024, (1, 1), "sd2")):
        layers = {
            proj: ((4, 320, *form), (320, 4, *form)),
            key: ((4, width), (320, 4)),
        }
        source = lora_file(tmp_path / f"{family}.safetensors", layers)
        spec = load_lora(source)[1]
        assert tell(spec, {})[0] == family
        tensors, _ = converted(source, "diffusers", tmp_path)
        written = tensors["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"]
        assert written.ndim == (4 if family == "sd1" else 2)


def test_flattened_windows_are_written_as_windows(tmp_path, capsys):
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    random = np.random.default_rng(0)
    down = random.normal(size=(4, 32, 3, 3)).astype(np.float32)
    tensors = {
        f"{stem}.lora_down.weight": torch.from_numpy(down.reshape(4, -1)),
        f"{stem}.lora_up.weight": torch.ones(32, 4),
    }
    save_file(tensors, tmp_path / "flat.safetensors")
    found, _ = converted(tmp_path / "flat.safetensors", "diffusers", tmp_path)
    written = found["unet.down_blocks.0.resnets.0.conv1.lora_A.weight"].float().numpy()
    scale = np.abs(down).max() / np.abs(written).max()  # balanced by a power of two
    np.testing.assert_allclose(written * scale, down, atol=2e-3)
    lora_file(tmp_path / "odd.safetensors", {stem: ((4, 100), (32, 4))})
    assert (
        main(["convert", str(tmp_path / "odd.safetensors"), "--out", "x", "--format", "kohya"]) == 2
    )
    assert "100 columns, expected those of a 3×3 window" in capsys.readouterr().err


def test_headers_that_say_two_things():
    with pytest.raises(UserError, match="sd_v1 but modelspec"):
        declared({**HEADERS["sd1"], **HEADERS["sdxl"]})
    assert declared({"ss_v2": "False"}) is None


@pytest.mark.parametrize(
    ("stem", "site"),
    [
        (FIRST.replace("lora_unet_", "lycoris_"), "down_blocks.0.attentions.0"),
        ("lora_te1_encoder_layers_0_self_attn_q_proj", "text_encoder.text_model"),
        ("lora_te_0_transformer_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder.text_model",
        ),
        ("clip_g.transformer.text_model.encoder.layers.0.mlp.fc2", "text_encoder_2.text_model"),
        (
            "unet.base_model.model._orig_mod.mid_block.attentions.0.proj_in",
            "mid_block.attentions.0.proj_in",
        ),
    ],
)
def test_names_of_other_programs(stem, site, tmp_path):
    source = lora_file(tmp_path / "in.safetensors", {stem: ((4, 64), (64, 4))}, alpha=8.0)
    lora, spec = load_lora(source)
    assert spec.sites[0].path.startswith(site)
    np.testing.assert_allclose(site_factors(lora, spec.sites[0])["up"], 2.0)


def test_up_factors_of_dylora_and_bundled_embeddings(tmp_path, capsys):
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    source = lora_file(tmp_path / "in.safetensors", {stem: ((4, 32, 3, 3), (32, 4))}, alpha=4.0)
    bundled = {f"bundle_emb.{name}.clip_l": torch.ones(2, 768) for name in ("bob", "anna")}
    save_file(load_file(source) | bundled, source)
    lora, spec = load_lora(source)
    said = "in.safetensors: its 2 bundled embeddings are not read (anna, bob)"
    assert said in capsys.readouterr().err
    save_file(bundled, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no factors of a LoRA"):
        load_lora(tmp_path / "none.safetensors")
    (site,) = spec.sites
    assert capsys.readouterr().err == ""
    assert site.kernel_size == (3, 3) and site_factors(lora, site)["up"].shape == (4, 32)


def test_differences_beside_the_factors_are_left_out_on_request(tmp_path, capsys):
    source = lora_file(tmp_path / "in.safetensors", {FIRST: ((4, 32), (32, 4))})  # norm 128
    norm = FIRST.replace("attn1_to_q", "norm1")
    beside = {f"{FIRST}.diff_b": torch.full((64,), 8.0), f"{norm}.w_norm": torch.full((32,), 8.0)}
    save_file(load_file(source) | beside, source)
    share = np.sqrt(64 * 96 / (64 * 96 + 128**2))
    with pytest.raises(UserError, match=f"holds 2 differences.*{share:.2%}.*--drop differences"):
        load_lora(source)
    out = tmp_path / "out.safetensors"
    for command in (
        ["convert", str(source), "--out", str(out), "--format", "kohya"],
        ["merge", str(source), "--out", str(out)],
    ):
        assert main([*command, "--drop", "differences"]) == 0
        assert "left out 2 differences of biases" in capsys.readouterr().err
        lora, spec = load_lora(out)
        np.testing.assert_array_equal(site_factors(lora, spec.sites[0])["up"], 1)


def test_layers_are_left_out_by_name(tmp_path, capsys):
    layers = {
        FIRST: ((4, 320), (320, 4)),
        "lora_unet_conv_in": ((4, 4, 3, 3), (320, 4, 1, 1)),
        "lora_te2_text_projection": ((4, 1280), (1280, 4)),
    }
    source = lora_file(tmp_path / "in.safetensors", layers, HEADERS["sdxl"])
    out = str(tmp_path / "out.safetensors")
    command = ["convert", str(source), "--out", out, "--format", "diffusers"]
    assert main(command) == 0
    written = load_file(out)
    assert written["unet.conv_in.lora_A.weight"].shape == (4, 4, 3, 3)
    assert written["text_encoder_2.text_projection.lora_B.weight"].shape == (1280, 4)
    capsys.readouterr()
    assert main([*command, "--drop", "conv_in", "text_projection", "conv_out"]) == 0
    assert "left out 2 of 3 layers (conv_in: 1, text_projection: 1, conv_out: 0)" in (
        capsys.readouterr().err
    )
    assert {key.split(".")[1] for key in load_file(out)} == {"down_blocks"}
    assert main([*command, "--drop", "unet", "down_blocks", "conv_in", "text_encoder_2"]) == 2
    assert "--drop leaves no layer" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_float8(dtype, tmp_path):
    source = lora_file(tmp_path / "in.safetensors", {FIRST: ((4, 320), (320, 4))}, alpha=8.0)
    stored = {key: (array * 1.5).to(dtype) for key, array in load_file(source).items()}
    save_file(stored, source)
    lora, spec = load_lora(source)
    pair = site_factors(lora, spec.sites[0])
    assert (pair["down"] == 1.5).all() and (pair["up"] == 1.5 * 12 / 4).all()


def test_layers_by_number_are_named(tmp_path):
    save_file({"unet:0:up": torch.ones(4, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="layers by number"):
        load_lora(tmp_path / "a.safetensors")


def test_pytorch_files_of_a_folder(tmp_path, capsys):
    folder, new = tmp_path / "in", tmp_path / "new"
    (folder / "bob.v1").mkdir(parents=True)
    file = folder / "bob.v1" / "pytorch_lora_weights.safetensors"
    lora_file(file, {FIRST: ((4, 320), (320, 4))}, alpha=8.0)
    tensors = {key: torch.nn.Parameter(x) for key, x in load_file(file).items()}
    for path in (file.with_suffix(".bin"), folder / "carl.pt", file.with_name("optimizer.bin")):
        torch.save(tensors, path)
    tensors[f"{FIRST}.alpha"] = 8
    torch.save({"state_dict": tensors, "step": 3}, folder / "dora.ckpt")
    convert = ["convert", str(folder), "--format", "kohya", "--dtype", "float32", "--out"]
    assert main([*convert, str(tmp_path / "out")]) == 0
    assert "not read: bob.v1/optimizer.bin, bob.v1/pytorch_lora_weights.bin" in (
        capsys.readouterr().err
    )
    file.unlink()
    assert main([*convert, str(new)]) == 0
    written = [new / f"{name}.safetensors" for name in ("bob.v1", "carl", "dora")]
    assert sorted(new.rglob("*.*")) == written
    first, *others = [path.read_bytes() for path in written]
    assert others == [first] * 2 and (tmp_path / "out" / "bob.v1.safetensors").read_bytes() == first
    assert load_lora(file.parent)[1] == load_lora(written[0])[1]
    (folder / "dora.ckpt").rename(folder / "E.CKPT")
    assert main([*convert, str(tmp_path / "upper")]) == 0
    assert (tmp_path / "upper" / "E.safetensors").read_bytes() == first
    # Safetensors under another name, code, and what is no LoRA.
    (folder / "carl.pt").write_bytes(first)
    assert load_lora(folder / "carl.pt")[1] == load_lora(written[0])[1]
    torch.save(tensors, folder / "carl.ckpt")
    capsys.readouterr()
    assert main(["inspect", str(folder / "carl.ckpt")]) == 0
    assert "LoRA, kohya keys" in capsys.readouterr().out
    torch.save({"x": print}, folder / "carl.pt")
    with pytest.raises(UserError, match=r"carl.pt: no PyTorch file of plain tensors"):
        load_lora(folder / "carl.pt")
    torch.save([torch.ones(2)], folder / "carl.pt")
    with pytest.raises(UserError, match=r"carl.pt: found list, expected tensors by their names"):
        load_lora(folder / "carl.pt")


def test_adapters_beside_the_one_of_a_folder_are_said(tmp_path, capsys):
    """PEFT keeps a model's further adapters in folders of their names inside the first one's."""
    source = lora_file(tmp_path / "in.safetensors", {FIRST: ((4, 320), (320, 4))})
    for name in ("a", "a/b"):
        command = ["convert", str(source), "--out", str(tmp_path / name), "--format", "peft"]
        assert main(command) == 0
    load_lora(tmp_path / "a")
    assert "a: holds further adapters, which are not read: b" in capsys.readouterr().err


def test_a_core_between_the_factors_of_a_convolution(tmp_path):
    """LyCORIS: up (core down) for every place of the window; times alpha / rank."""
    name, random = "lora_unet_down_blocks_0_resnets_0_conv1", np.random.default_rng(0)
    shapes = {"lora_mid": (4, 4, 3, 3), "lora_down": (4, 32, 1, 1), "lora_up": (48, 4, 1, 1)}
    parts = {key: random.normal(size=shape).astype("f4") for key, shape in shapes.items()}
    tensors = {f"{name}.{key}.weight": torch.from_numpy(array) for key, array in parts.items()}
    save_file(tensors | {f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    written, _ = converted(tmp_path / "a.safetensors", "diffusers", tmp_path)
    core, down, up = (array.astype(np.float64) for array in parts.values())
    wanted = 0.5 * np.einsum("mnhw,ni,om->oihw", core, down[..., 0, 0], up[..., 0, 0])
    a, b = (array.double().numpy() for _, array in sorted(written.items()))
    np.testing.assert_allclose(
        (b[..., 0, 0] @ a.reshape(4, -1)).reshape(wanted.shape), wanted, atol=2e-2
    )


def test_a_rank_above_both_widths(tmp_path, capsys):
    source = lora_file(tmp_path / "in.safetensors", {FIRST: ((384, 320), (320, 384))}, alpha=384.0)
    assert load_lora(source)[1].sites[0].rank == 384
    out = str(tmp_path / "out.safetensors")
    assert (
        main(["convert", str(source), "--out", out, "--format", "kohya", "--dtype", "float32"]) == 0
    )
    assert "1 sites, rank 320," in capsys.readouterr().out
    lora, spec = load_lora(out)
    pair = site_factors(lora, spec.sites[0])
    np.testing.assert_allclose(pair["down"] @ pair["up"], 384, rtol=1e-4)
    swapped = lora_file(tmp_path / "swapped.safetensors", {FIRST: ((320, 4), (4, 320))})
    with pytest.raises(UserError, match="swapped factors"):
        load_lora(swapped)


def test_two_sources_of_one_target(tmp_path, capsys):
    layers = {FIRST: ((4, 320), (320, 4))}
    (tmp_path / "in" / "bob").mkdir(parents=True)
    lora_file(tmp_path / "in" / "bob.safetensors", layers)
    lora_file(tmp_path / "in" / "bob" / "pytorch_lora_weights.safetensors", layers)
    assert (
        main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--format", "kohya"])
        == 2
    )
    assert "would both become" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


OWNERS = {
    "ss_tag_frequency": '{"anna": {"sks woman": 12}}', "modelspec.author": "Anna",
    "modelspec.license": "CC-BY-4.0", "modelspec.trigger_phrase": "sks woman", "license": "CC0",
    "modelspec.title": "Anna's portraits", "ss_training_comment": "second try",
}  # fmt: skip


def test_the_owners_words_survive(tmp_path):
    stale = {"ss_network_dim": "999", "sshs_model_hash": "feed", "ss_network_args": "{}"}
    layers = {FIRST: ((4, 320), (320, 4))}
    source = lora_file(tmp_path / "in.safetensors", layers, HEADERS["sd1"] | OWNERS | stale)
    for to in ("kohya", "diffusers"):
        header = converted(source, to, tmp_path)[1]
        assert {key: header.get(key) for key in OWNERS} == OWNERS
        assert header.get("ss_network_dim", "4") == "4" and header.get("sshs_model_hash") != "feed"
    others = {**OWNERS, "modelspec.author": "Bert"}
    second = lora_file(tmp_path / "second.safetensors", layers, HEADERS["sd1"] | others)
    merged = tmp_path / "merged.safetensors"
    assert main(["merge", str(source), str(second), "--out", str(merged)]) == 0
    with safe_open(merged, "pt") as file:
        header = file.metadata()
    assert header["modelspec.license"] == "CC-BY-4.0" and "modelspec.author" not in header


def test_merging_two_files_of_the_embedded_base(tmp_path, capsys):
    """generate → merge → sample: tiny-sd looks like SDXL, the files say what they are."""
    import jax

    from hyperlora_jax.lora import factors
    from hyperlora_jax.lora_files import save_lora
    from hyperlora_jax.stable_diffusion.embedded import load_base

    sd = load_base("tiny-sd")
    spec = sd.lora_spec("attn-qkvo", 2)
    paths = []
    for k in range(2):
        lora = jax.device_get(factors.init(jax.random.key(k), spec))
        texts = {"base": "tiny-sd", "base_hash": sd.base_hash, "seed": k, "generator": "regression"}
        paths.append(tmp_path / f"{k}.safetensors")
        save_lora(paths[-1], lora, spec, family="sd1", metadata=texts)
    merged = tmp_path / "both.safetensors"
    assert main(["merge", f"{paths[0]}=0.7", f"{paths[1]}=0.5", "--out", str(merged)]) == 0
    with safe_open(merged, "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v1"
    assert header["hyperlora.base_hash"] == sd.base_hash
    assert not {"hyperlora.seed", "hyperlora.generator"} & set(header)
    assert load_lora(merged, sd)[1].max_rank == 4
    again = tmp_path / "again.safetensors"
    checked = [
        "convert",
        str(merged),
        "--out",
        str(again),
        "--format",
        "diffusers",
        "--base",
        "tiny-sd",
    ]
    assert main(checked) == 0
    assert header["hyperlora.base"] == "tiny-sd"


def test_factors_of_one_layer_in_two_forms_are_added(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    flat = lora_file(tmp_path / "a.safetensors", {stem: ((4, 64), (64, 4))}, HEADERS["sd1"])
    wide = lora_file(tmp_path / "b.safetensors", {stem: ((2, 64, 1, 1), (64, 2, 1, 1))})
    out = tmp_path / "out.safetensors"
    assert main(["merge", str(flat), str(wide), "--out", str(out)]) == 0
    lora, spec = load_lora(out)
    (site,) = spec.sites
    pair = site_factors(lora, site)
    assert (site.kind, site.rank) == ("conv", 6)
    np.testing.assert_allclose(pair["down"].reshape(64, 6) @ pair["up"], 6.0)
