import json

import jax
import ml_dtypes
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import gauge
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors
from hyperlora_jax.lora_files import load_lora, read_metadata, save_lora
from hyperlora_jax.lora_files.safetensors_io import read
from hyperlora_jax.lora_files.writing import FORMATS
from tests.lora_files.conftest import random_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
SPEC = LoraSpec(
    (
        LoraSite(BLOCK + "attn1.to_q", 8, 8, 2),
        LoraSite(BLOCK + "attn2.to_k", 6, 8, 3),
        LoraSite("down_blocks.0.attentions.0.proj_in", 8, 8, 2, "conv"),
        LoraSite("down_blocks.0.downsamplers.0.conv", 8, 8, 2, "conv", (3, 3), (2, 2)),
        LoraSite("text_encoder.text_model.encoder.layers.1.self_attn.q_proj", 6, 6, 1),
    )
)


def deltas(lora, spec):
    result = {}
    for site in spec:
        pair = site_factors(lora, site)
        down = np.asarray(pair["down"], np.float64).reshape(site.fan_in, site.rank)
        result[site.path] = down @ np.asarray(pair["up"], np.float64)
    return result


def contents(path):
    """All bytes of a file or a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file.read_bytes() for file in files if file.is_file()]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_write_read_write(tmp_path, format, dtype):
    given = SPEC.component("unet") if format == "weights2weights" else SPEC
    lora = random_lora(given)
    first = save_lora(tmp_path / "a", lora, given, format, dtype)
    back, spec = load_lora(first)
    assert spec == (given.with_rank(3) if format == "weights2weights" else given)
    assert read_metadata(first)["hyperlora.spec"] == spec.fingerprint
    error = {"float32": 0, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    if format in ("weights2weights", "kohya"):  # both carry scales that are no powers of two
        error += 3e-7
    for name, value in deltas(back, spec).items():
        wanted = deltas(lora, given)[name]
        assert np.abs(value - wanted).max() <= error * np.abs(wanted).max(), name
    second = save_lora(tmp_path / "b", back, spec, format, dtype)
    assert contents(first) == contents(second)


def test_weights2weights_vectors_come_back_bit_for_bit(tmp_path):
    block = "mid_block.attentions.0.transformer_blocks.0."
    spec = LoraSpec(
        tuple(
            LoraSite(f"{block}attn{k}.to_{p}", 8 if k == "1" else 6, 8, 1)
            for k in "12"
            for p in "qv"
        )
    )
    vector = np.random.default_rng(0).standard_normal(spec.num_parameters).astype(np.float32)
    vector = vector.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.save(tmp_path / "given.npy", vector[None])
    lora, _ = load_lora(tmp_path / "given.npy", spec)
    pair = site_factors(lora, spec.sites[0])
    np.testing.assert_array_equal(pair["down"][:, 0], vector[:8])
    np.testing.assert_array_equal(pair["up"][0], 27 * vector[8:16])
    folder = save_lora(tmp_path / "out", lora, spec, "weights2weights", "float32")
    np.testing.assert_array_equal(np.load(folder / "weights.npy"), vector)
    jax.tree.map(np.testing.assert_array_equal, load_lora(folder)[0], lora)
    config = json.loads((folder / "unet" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 27)
    keys = read(folder / "unet" / "adapter_model.safetensors")[0]
    assert f"base_model.model.{block}attn1.to_q.lora_A.identity1.weight" in keys
    with pytest.raises(UserError, match="a LoraSpec is needed"):
        load_lora(tmp_path / "given.npy")
    with pytest.raises(UserError, match=r"60 numbers of float32, the spec has"):
        load_lora(tmp_path / "given.npy", spec.with_rank(2))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"bad\.npy: no readable"):
        load_lora(tmp_path / "bad.npy", spec)
    with pytest.raises(UserError, match=r"q_proj cannot be carried by weights2weights"):
        save_lora(tmp_path / "t", random_lora(SPEC), SPEC, "weights2weights")


def test_the_expected_spec_gets_its_own_ranks_back(tmp_path):
    lora = random_lora(SPEC)
    padded = gauge.pad_rank(lora, 3)
    path = save_lora(tmp_path / "a.safetensors", padded, SPEC.with_rank(3), dtype="float32")
    back, spec = load_lora(path, SPEC)
    assert spec == SPEC
    jax.tree.map(np.testing.assert_array_equal, back, lora)
    with pytest.raises(UserError, match="has rank 3, expected 1"):
        load_lora(path, SPEC.with_rank(1))


def test_another_block_layout_is_noticed(tmp_path):
    spec = LoraSpec((LoraSite("up_blocks.1.attentions.0.proj_in", 8, 8, 2),))
    path = tmp_path / "a.safetensors"
    save_lora(path, random_lora(spec), spec, family="sdxl", layers_per_block=1)
    with pytest.raises(UserError, match="damaged or of another block layout"):
        load_lora(path)


def test_another_base_is_refused_naming_both_sides(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", random_lora(SPEC), SPEC, metadata={"seed": 1})
    wider = LoraSpec(tuple(LoraSite(s.path, 16, s.out_features, s.rank, s.kind, s.kernel_size)
                           for s in SPEC))  # fmt: skip
    with pytest.raises(UserError, match=r"8→8.* in the file, 16→8.* in the expected spec"):
        load_lora(path, wider)
    with pytest.raises(UserError, match="expected 6"):
        load_lora(path, LoraSpec((*SPEC.sites, LoraSite("mid_block.resnets.0.conv1", 8, 8, 1))))


class Base:
    """What `load_lora` needs of a StableDiffusion."""

    base_hash = "b" * 64

    def __init__(self, spec):
        kernels = {}
        for site in spec:
            node = kernels
            for part in site.module_path:
                node = node.setdefault(part, {})
            shape = (*site.down_shape[:-1], site.out_features)
            node["kernel"] = jax.ShapeDtypeStruct(shape, np.float32)
        text = kernels.pop("text_encoder")
        self.params = {"unet": kernels, "text_encoder": text}


def test_the_base_hash_is_compared(tmp_path):
    lora = random_lora(SPEC)
    for value, fits in (("b" * 64, True), ("a" * 64, False)):
        path = save_lora(tmp_path / "a.safetensors", lora, SPEC, metadata={"base_hash": value})
        assert read_metadata(path)["hyperlora.base_hash"] == value
        if fits:
            assert load_lora(path, Base(SPEC))[1] == SPEC
        else:
            with pytest.raises(UserError, match="made for base aaaaaaaaaaaa…, this base is bbbb"):
                load_lora(path, Base(SPEC))


def test_a_layer_that_the_base_lacks_is_named(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", random_lora(SPEC), SPEC)
    fewer = LoraSpec((SPEC.sites[0], SPEC.sites[-1]))
    with pytest.raises(UserError, match=r"the base has no layer .*\(8→8 in the file\)"):
        load_lora(path, Base(fewer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "lycoris"}, "format 'lycoris' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"family": "flux"}, "family 'flux' is unknown"),
        ({"metadata": {"seed": [3]}}, "metadata 'seed': .3. is no text"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        save_lora(tmp_path / "a.safetensors", random_lora(SPEC), SPEC, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float32", "attn1.to_q has NaN or Inf"),
        (np.inf, "float16", "attn1.to_q has NaN or Inf"),
        (1e18, "float16", "attn1.to_q overflows float16"),
    ],
)
def test_bad_numbers_are_refused_naming_the_site(tmp_path, value, dtype, message):
    lora = random_lora(SPEC)
    pair = site_factors(lora, SPEC.by_path[BLOCK + "attn1.to_q"])
    pair["down"][0, 0] = pair["up"][0, 0] = value
    sites = LoraSpec((SPEC.by_path[BLOCK + "attn1.to_q"],))
    tree = {"down_blocks_0": {"attentions_0": {"transformer_blocks_0": {"attn1": {"to_q": pair}}}}}
    with pytest.raises(UserError, match=message):
        save_lora(tmp_path / "a.safetensors", tree, sites, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_sites_without_a_name_in_any_file_are_refused(tmp_path):
    spec = LoraSpec((LoraSite("conv_norm_out", 4, 8, 2),))
    with pytest.raises(UserError, match="conv_norm_out is no layer of a Stable Diffusion UNet"):
        save_lora(tmp_path / "a.safetensors", random_lora(spec), spec)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_a_rank_above_the_layers_width_is_cut_without_loss(tmp_path, format):
    wide = LoraSite(BLOCK + "attn2.to_k", 24, 24, 40)
    spec = LoraSpec((SPEC.by_path[BLOCK + "attn1.to_q"], wide))
    lora = random_lora(spec)
    back, found = load_lora(save_lora(tmp_path / "a", lora, spec, format, "float32"))
    assert [site.rank for site in found] == [2, 24]
    for name, value in deltas(back, found).items():
        np.testing.assert_allclose(value, deltas(lora, spec)[name], atol=3e-6)


def test_mixed_ranks_are_written_as_they_are(tmp_path):
    """A wide layer makes the others no larger; kohya files keep one alpha, as diffusers needs."""
    sizes = [LoraSite(f"{BLOCK}attn1.{name}", 32, 32, 1) for name in ("to_k", "to_q", "to_v")]
    spec = LoraSpec((*sizes, LoraSite(f"{BLOCK}attn2.to_q", 32, 32, 30)))
    for format in ("kohya", "diffusers", "peft"):
        path = save_lora(tmp_path / format, random_lora(spec), spec, format, "float32")
        assert load_lora(path)[1] == spec
        file = path / "adapter_model.safetensors" if format == "peft" else path
        tensors = read(file)[0]
        assert sum(array.size for array in tensors.values()) <= spec.num_parameters + len(spec)
        assert {float(v) for k, v in tensors.items() if k.endswith(".alpha")} <= {30.0}


def test_a_batch_is_refused(tmp_path):
    lora = jax.tree.map(lambda leaf: leaf[None], random_lora(SPEC))
    with pytest.raises(ValueError, match="takes one LoRA, got a batch"):
        save_lora(tmp_path / "a.safetensors", lora, SPEC)


def test_unbalanced_factors_survive_float16(tmp_path):
    lora = random_lora(SPEC)
    lora = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (2.0**20 if path[-1].key == "down" else 2.0**-24), lora
    )
    path = save_lora(tmp_path / "a.safetensors", lora, SPEC)
    back, spec = load_lora(path)
    for name, value in deltas(back, spec).items():
        wanted = deltas(lora, SPEC)[name]
        assert np.abs(value - wanted).max() <= 2e-3 * np.abs(wanted).max(), name


def test_files_that_are_not_there_or_folders(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_lora(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="folder without pytorch_lora_weights"):
        load_lora(tmp_path)
    path = save_lora(tmp_path / "folder", random_lora(SPEC), SPEC, "diffusers")
    assert path == tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    assert load_lora(tmp_path / "folder")[1] == SPEC
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        save_lora(tmp_path / "file", random_lora(SPEC), SPEC, "peft")
    with pytest.raises(UserError, match="cannot write here"):
        save_lora(tmp_path / "file" / "a.safetensors", random_lora(SPEC), SPEC)
