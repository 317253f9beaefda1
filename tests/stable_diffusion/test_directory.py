import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.lora_files.base_files import read_json
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.weights import directory, loading

STEM = "diffusion_pytorch_model"


@pytest.fixture
def unet_folder(tiny_pipeline, tmp_path):
    shutil.copytree(tiny_pipeline[0] / "unet", tmp_path / "unet")
    return tmp_path / "unet"


def same(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(leaves_a) == len(leaves_b) and all(map(np.array_equal, leaves_a, leaves_b))


def test_shards_and_pickles_hold_the_same_tensors(unet_folder):
    single = unet_folder / f"{STEM}.safetensors"
    _, expected = loading.load_component(unet_folder, "unet", jnp.float32)
    tensors = load_file(single)
    single.unlink()
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, unet_folder / f"{STEM}.bin")
    assert same(loading.load_component(unet_folder, "unet", jnp.float32)[1], expected)
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        shard = f"{STEM}-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, unet_folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = unet_folder / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(loading.load_component(unet_folder, "unet", jnp.float32)[1], expected)
    for i, file in enumerate(sorted(unet_folder.glob("*-of-*"))):
        kept = {k: torch.from_numpy(v) for k, v in load_file(file).items()}
        torch.save(kept, file.with_suffix(".bin"))
        if i == 0:
            file.unlink()
    pickled = index.with_name(f"{STEM}.bin.index.json")
    pickled.write_text(index.read_text().replace(".safetensors", ".bin"))
    (unet_folder / f"{STEM}.bin").unlink()
    with pytest.raises(UserError, match=r"00001-of-00002\.safetensors: file not found, named by"):
        loading.load_component(unet_folder, "unet", jnp.float32)
    index.unlink()
    assert same(loading.load_component(unet_folder, "unet", jnp.float32)[1], expected)
    (unet_folder / shard).with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.bin: file not found, named by"):
        loading.load_component(unet_folder, "unet", jnp.float32)


def test_fp16_variant_has_the_identity_of_its_base(tiny_pipeline, tmp_path):
    shutil.copytree(tiny_pipeline[0], tmp_path / "sd")
    base = StableDiffusion.from_pretrained(tmp_path / "sd").base_hash
    for path in (tmp_path / "sd").rglob("*.safetensors"):
        half = {k: v.astype(np.float16) for k, v in load_file(path).items()}
        save_file(half, path.with_name(path.stem + ".fp16.safetensors"))
        path.unlink()
    for variant in ("fp16", None):  # named, or found because there is no other
        half = StableDiffusion.from_pretrained(tmp_path / "sd", jnp.bfloat16, variant=variant)
        assert half.base_hash == base
        assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}


def test_an_outline_knows_everything_but_the_numbers(tiny_pipeline, tmp_path):
    shutil.copytree(tiny_pipeline[0], tmp_path / "sd")
    whole = StableDiffusion.from_pretrained(tmp_path / "sd")
    expected = directory.hash_of_params(whole.params["unet"])
    shutil.rmtree(tmp_path / "sd/vae")
    (tmp_path / "sd/text_encoder/model.safetensors").write_bytes(b"not read")
    outline = StableDiffusion.outline(tmp_path / "sd")
    assert outline.lora_spec("all", 2) == whole.lora_spec("all", 2)
    assert outline.base_hash == expected
    spec = whole.lora_spec("w2w", 2)
    path = save_lora(tmp_path / "a.safetensors", factors.init(jax.random.key(0), spec), spec)
    assert load_lora(path, outline)[1] == load_lora(path, whole)[1]
    (tmp_path / "sd/unet/config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        StableDiffusion.outline(tmp_path / "sd")


def test_autoencoder_that_overflows_stays_float32():
    assert loading.component_dtype("vae", {"force_upcast": True}, jnp.float16) == np.float32
    assert loading.component_dtype("vae", {"force_upcast": False}, jnp.float16) == jnp.float16
    assert loading.component_dtype("unet", {}, jnp.float16) == jnp.float16


class Trap:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickle_with_code_is_refused(unet_folder, capsys):
    (unet_folder / f"{STEM}.safetensors").unlink()
    with (unet_folder / f"{STEM}.bin").open("wb") as file:
        pickle.dump({"conv_in.weight": Trap()}, file)
    with pytest.raises(
        UserError, match=r"no PyTorch file of plain tensors.*save its state_dict as"
    ):
        loading.load_component(unet_folder, "unet", jnp.float32)
    assert "code ran" not in capsys.readouterr().out


def test_every_tensor_must_fit(unet_folder):
    path = unet_folder / f"{STEM}.safetensors"
    tensors = load_file(path)

    def load(changed):
        save_file(changed, path)
        return loading.load_component(unet_folder, "unet", jnp.float32)

    with pytest.raises(UserError, match=r"tensor 'lora.weight' is unknown to the unet"):
        load({**tensors, "lora.weight": np.zeros(1, np.float32)})
    with pytest.raises(UserError, match=r"1 tensors are missing, first 'conv_in.weight'"):
        load({k: v for k, v in tensors.items() if k != "conv_in.weight"})
    with pytest.raises(UserError, match=r"'conv_in.bias' has Flax shape \(3,\), expected"):
        load({**tensors, "conv_in.bias": np.zeros(3, np.float32)})
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"too few for a \.safetensors file"):
        loading.load_component(unet_folder, "unet", jnp.float32)


def test_bad_json_names_the_file(unet_folder):
    config = unet_folder / "config.json"
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a readable JSON file"):
        read_json(config)
    config.write_text("[]")
    with pytest.raises(UserError, match="found list, expected a JSON object"):
        read_json(config)
    with pytest.raises(UserError, match=r"nowhere\.json: file not found"):
        read_json(unet_folder / "nowhere.json")


def test_old_tensor_names_are_read():
    from hyperlora_jax.stable_diffusion.weights.flax_trees import today_name

    old = "encoder.mid_block.attentions.0.proj_attn.weight"
    assert today_name(old, "vae") == "encoder.mid_block.attentions.0.to_out.0.weight"
    bare = "encoder.layers.0.mlp.fc1.weight"
    assert today_name(bare, "text_encoder") == f"text_model.{bare}"
    assert today_name(f"text_model.{bare}", "text_encoder") == f"text_model.{bare}"
    assert today_name("text_projection.weight", "text_encoder_2") == "text_projection.weight"
    assert today_name("text_model.embeddings.position_ids", "text_encoder") is None
