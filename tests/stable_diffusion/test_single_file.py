"""Original single files. The names are written out here from diffusers' names by the inverse of
the public converters' tables, then read back; diffusers' own converters judge."""

import concurrent.futures
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.weights.families import configs_of
from hyperlora_jax.stable_diffusion.weights.flax_trees import (
    flax_to_torch,
    param_shapes,
    tensor_name,
)
from hyperlora_jax.stable_diffusion.weights.loading import CONSTRUCTORS, load_schedule
from hyperlora_jax.stable_diffusion.weights.original_names import translate
from hyperlora_jax.stable_diffusion.weights.single_file import unpacked

from .conftest import tiny_text_config, tiny_unet_config, tiny_vae_config, write_tokenizer

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(name, config):
    per_block = config["layers_per_block"] + 1
    attends = ["CrossAttn" in t for t in config["up_block_types"]]
    for new, old in ENDS.items():
        if name.startswith(new + "."):
            return old + name[len(new) :]
    parts = name.split(".")
    if parts[0] == "mid_block":
        index = {"resnets": 2 * int(parts[2]), "attentions": 1}[parts[1]]
        prefix, rest = f"middle_block.{index}", parts[3:]
    else:
        side, block, kind, i, rest = parts[0], int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if side == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{(block + 1) * per_block}.0.op.{rest[-1]}"
            row = 1 + block * per_block + i
            prefix = f"input_blocks.{row}.{int(kind == 'attentions')}"
        elif kind == "upsamplers":
            row = (block + 1) * per_block - 1
            return f"output_blocks.{row}.{1 + attends[block]}.conv.{rest[-1]}"
        else:
            prefix = f"output_blocks.{block * per_block + i}.{int(kind == 'attentions')}"
    if "resnets" in parts:
        rest = [RESNET[rest[0]], *rest[1:]]
    return ".".join([prefix, *rest])


def original_vae_name(name, levels):
    name = re.sub(
        r"up_blocks\.(\d+)",
        lambda m: f"up.{levels - 1 - int(m[1])}",
        name.replace("down_blocks", "down"),
    )
    for new, old in (
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("conv_norm_out", "norm_out"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("resnets", "block"),
        ("conv_shortcut", "nin_shortcut"),
    ):
        name = name.replace(new, old)
    return name


def original_open_clip(tensors):
    out = {}
    for name, value in tensors.items():
        if name == "text_projection.weight":
            out["text_projection"] = np.ascontiguousarray(value.T)
            continue
        name = name.replace("text_model.encoder.layers", "transformer.resblocks")
        name = name.replace(
            "text_model.embeddings.position_embedding.weight", "positional_embedding"
        )
        name = name.replace("text_model.embeddings.", "").replace(
            "text_model.final_layer_norm", "ln_final"
        )
        name = name.replace("layer_norm", "ln_").replace("self_attn", "attn")
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        if found := re.match(r"(.*)\.([qkv])_proj\.(weight|bias)", name):
            if found[2] == "q":
                stem = next(k for k in tensors if tensors[k] is value)
                parts = [tensors[stem.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                out[f"{found[1]}.in_proj_{found[3]}"] = np.concatenate(parts)
            continue
        out[name] = value
    return out


def random_tensors(configs, seed=0):
    rng = np.random.default_rng(seed)
    out = {}
    for name, config in configs.items():
        shapes = param_shapes(CONSTRUCTORS[name](config))
        params = jax.tree.map(
            lambda s: 0.1 * rng.standard_normal(s.shape).astype(np.float32), shapes
        )
        out[name] = params
    return out


def original_file(configs, trees):
    """{original name: tensor} of a whole model, with the buffers that real files carry."""
    tensors = {"betas": np.zeros(3, np.float32), "model_ema.decay": np.zeros(1, np.float32)}
    for name, value in flax_to_torch(trees["unet"]).items():
        tensors["model.diffusion_model." + original_unet_name(name, configs["unet"])] = value
    levels = len(configs["vae"]["block_out_channels"])
    for name, value in flax_to_torch(trees["vae"]).items():
        if ".attentions." in name and value.ndim == 2:
            value = value[:, :, None, None]  # 1×1 convolutions in the original
        tensors["first_stage_model." + original_vae_name(name, levels)] = value
    xl = "text_encoder_2" in configs
    first = flax_to_torch(trees["text_encoder"])
    if configs["text_encoder"]["hidden_act"] == "gelu":  # SD 2.x: OpenCLIP with one layer more
        named = original_open_clip(first)
        count = configs["text_encoder"]["num_hidden_layers"]
        spare = f"transformer.resblocks.{count}.mlp.c_fc.weight"
        named |= {spare: np.zeros(3, np.float32), "logit_scale": np.zeros(1, np.float32)}
        tensors |= {f"cond_stage_model.model.{k}": v for k, v in named.items()}
    else:
        prefix = "conditioner.embedders.0." if xl else "cond_stage_model."
        tensors |= {f"{prefix}transformer.{k}": v for k, v in first.items()}
        tensors[f"{prefix}transformer.text_model.embeddings.position_ids"] = np.zeros(1, np.float32)
    if xl:
        second = original_open_clip(flax_to_torch(trees["text_encoder_2"]))
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    return tensors


WIDE = {"block_out_channels": [32, 64], "norm_num_groups": 32}
UNET = tiny_unet_config(**WIDE, attention_head_dim=8, sample_size=64)
VAE = tiny_vae_config(**WIDE, down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.18215, sample_size=512)  # fmt: skip
CLIP_L = tiny_text_config(num_attention_heads=1, eos_token_id=2)
OPEN_CLIP = {**CLIP_L, "hidden_act": "gelu"}
TINY = {
    "sd1": {"unet": {**UNET, "layers_per_block": 2}, "vae": VAE, "text_encoder": CLIP_L},
    "sd2": {
        "unet": {**UNET, "use_linear_projection": True, "attention_head_dim": [1, 1]},
        "vae": {**VAE, "layers_per_block": 2},
        "text_encoder": OPEN_CLIP,
    },
    "sdxl": {
        "unet": {
            **UNET,
            "use_linear_projection": True,
            "attention_head_dim": [1, 1],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 56,
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 48,
            "sample_size": 128,
        },
        "vae": {**VAE, "scaling_factor": 0.13025, "sample_size": 1024},
        "text_encoder": CLIP_L,
        "text_encoder_2": {**OPEN_CLIP, "architectures": ["CLIPTextModelWithProjection"]},
    },
}
SSD = {  # SSD-1B and Vega: other depths in every layer, one resnet in the middle
    **TINY["sdxl"],
    "unet": {
        **TINY["sdxl"]["unet"],
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[2, 1, 1], 1],
    },
}
KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))


def write(path, tensors, header=None):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, header)
    return path


@pytest.mark.parametrize("configs", [*TINY.values(), SSD], ids=[*TINY, "ssd"])
def test_every_tensor_comes_back_and_the_configs_are_told_by_shapes(configs, tmp_path, capsys):
    trees = random_tensors(configs)
    path = write(tmp_path / "model.safetensors", original_file(configs, trees))
    sd = StableDiffusion.from_pretrained(unpacked(path, "epsilon"))
    assert sd.params.keys() == trees.keys()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, sd.params, trees)))
    for name, config in configs.items():
        module, wanted = getattr(sd, name), CONSTRUCTORS[name](config)
        if name == "unet":
            assert_same_unet(module, wanted)
            continue
        for key in wanted.values.keys() - {"architectures", "projection_dim"}:
            assert module.values[key] == wanted.values[key], (name, key)
    assert main(["inspect", str(path)]) == 0
    assert sd.base_hash in capsys.readouterr().out


def assert_same_unet(found, wanted):
    for field in vars(wanted.settings).keys() - {"source"}:
        assert getattr(found.settings, field) == getattr(wanted.settings, field), field


TRUE = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}


def torch_shape(leaf):
    order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim, (0,))
    return tuple(leaf.shape[axis] for axis in order)


@pytest.mark.parametrize("family", TRUE)
def test_true_unets_equal_the_converter_of_diffusers(family):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    wanted = CONSTRUCTORS["unet"](TRUE[family])
    config = {"layers_per_block": 2, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    config |= TRUE[family]
    shapes = {
        tensor_name(path): torch_shape(s) for path, s in flatten_dict(param_shapes(wanted)).items()
    }
    originals = {f"model.diffusion_model.{original_unet_name(n, config)}": n for n in shapes}
    converted = convert_ldm_unet_checkpoint({k: k for k in originals}, config)
    assert len(converted) == len(shapes)
    found = configs_of({old: shapes[new] for old, new in originals.items()})
    assert_same_unet(CONSTRUCTORS["unet"](found["unet"]), wanted)
    for new, original in converted.items():
        (target,) = translate(original, found)
        assert target.name == new == originals[original]


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for tensors, message in (
        ({"a": np.zeros(1)}, "no cross-attention under model.diffusion_model"),
        ({KEY: np.zeros((4, 5))}, "no cross-attention under model.diffusion_model"),
    ):
        with pytest.raises(UserError, match=message):
            StableDiffusion.from_pretrained(write(path, tensors))
    whole = original_file(TINY["sd1"], random_tensors(TINY["sd1"]))
    lacking = {name: value for name, value in whole.items() if name != KEY}
    with pytest.raises(UserError, match=r"1 tensors are missing, first '.*attn2.to_k.weight'"):
        StableDiffusion.from_pretrained(write(path, lacking))
    xl = original_file(TINY["sdxl"], random_tensors(TINY["sdxl"]))
    bare = {name: value for name, value in xl.items() if not name.startswith("conditioner.")}
    with pytest.raises(UserError, match=r"model.safetensors: UNet config: .*_dim is 56, expected"):
        StableDiffusion.from_pretrained(write(path, bare))
    with pytest.raises(UserError, match=r"'control\.x' belongs to no known part"):
        StableDiffusion.from_pretrained(write(path, {**whole, "control.x": np.zeros(1)}))


@pytest.mark.parametrize(
    ("family", "marks", "header", "expected"),
    [
        ("sd1", {}, {}, ("epsilon", False)),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ("sdxl", {"v_pred": 0}, {}, ("v_prediction", False)),
        ("sdxl", {"v_pred": 0, "ztsnr": 0}, {}, ("v_prediction", True)),
        ("sdxl", {}, {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
    ],
)
def test_marks_say_what_the_unet_predicts(family, marks, header, expected, tmp_path):
    configs = TINY[family]
    tensors = original_file(configs, random_tensors(configs))
    tensors |= {name: np.zeros(size, np.float32) for name, size in marks.items()}
    path = write(tmp_path / "model.safetensors", tensors, header)
    schedule = load_schedule(unpacked(path))
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == expected
    assert load_schedule(unpacked(path, "sample")).prediction_type == "sample"


def test_sd2_files_are_told_by_their_step_or_ask(tmp_path, capsys):
    text = {**OPEN_CLIP, "hidden_size": 1024, "num_attention_heads": 16}
    configs = {"unet": {**TINY["sd2"]["unet"], "cross_attention_dim": 1024}, "text_encoder": text}
    tensors = original_file({**configs, "vae": VAE}, random_tensors({**configs, "vae": VAE}))
    for step, expected in ((None, "v_prediction"), (875000, "epsilon"), (140000, "v_prediction")):
        mark = {} if step is None else {"global_step": np.asarray(step, np.int64)}
        path = write(tmp_path / f"{step}.safetensors", {**tensors, **mark})
        folder = unpacked(path)
        assert load_schedule(folder).prediction_type == expected
        size = json.loads((folder / "unet" / "config.json").read_text())["sample_size"]
        assert size == (96 if expected == "v_prediction" else 64)
        assert ("--prediction_type epsilon" in capsys.readouterr().out) == (step is None)


def test_marks_that_contradict_each_other_or_mean_edm(tmp_path):
    path, empty = tmp_path / "model.safetensors", np.zeros(0, np.float32)
    tensors = original_file(TINY["sd1"], random_tensors(TINY["sd1"])) | {"v_pred": empty}
    write(path, tensors, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(UserError, match=r"'v_pred' says v_prediction.*prediction_type says eps"):
        StableDiffusion.from_pretrained(path)
    write(path, {**tensors, "edm_mean": empty})
    with pytest.raises(UserError, match="'edm_mean' marks an EDM model"):
        StableDiffusion.from_pretrained(path)


@pytest.fixture
def single(tmp_path):
    """An XL single file, a tokenizer, and a LoRA of it."""
    configs = TINY["sdxl"]
    path = write(tmp_path / "xl.safetensors", original_file(configs, random_tensors(configs)))
    write_tokenizer(tmp_path / "tokens")
    sd = StableDiffusion.from_pretrained(path)
    spec = sd.lora_spec("attn-qkvo", 2)
    lora = jax.device_get(factors.init(jax.random.key(0), spec))
    lora = jax.tree.map(lambda leaf: leaf + np.float32(0.1), lora)
    return path, save_lora(tmp_path / "anna.safetensors", lora, spec, family="sdxl")


def run(capsys, *arguments, code=0):
    found = main([str(item) for item in arguments])
    said = capsys.readouterr()
    assert found == code, said
    return said.out + said.err


def test_a_single_file_goes_through_the_commands(single, tmp_path, capsys, pytorch_here):
    path, lora = single
    draw = ("--prompt", "a cat", "--num_steps", 1, "--height", 16, "--width", 16, "--out")
    tokens = ("--tokenizer", tmp_path / "tokens")
    run(capsys, "sample", path, "--lora", lora, *draw, tmp_path / "a", *tokens)
    assert "equals PyTorch" in run(capsys, "inspect", path, "--verify")
    out = tmp_path / "out.safetensors"
    said = run(
        capsys, "convert", lora, "--out", out, "--format", "kohya", "--base", path, "--verify"
    )
    assert "no missing and no unexpected key" in said
    run(capsys, "import", lora, "--base", path, "--out", tmp_path / "targets", "--workers", 1)
    tuned = tmp_path / "tuned.safetensors"
    run(capsys, "merge", lora, "--into", path, "--out", tuned)
    before, after = load_file(path), load_file(tuned)
    assert before.keys() == after.keys()
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed and all("attn" in key and key.startswith("model.") for key in changed)
    run(capsys, "sample", tuned, *draw, tmp_path / "b", *tokens)  # the same picture
    from PIL import Image

    pictures = [np.asarray(Image.open(next((tmp_path / n).iterdir())), int) for n in "ab"]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    run(capsys, "extract", path, tuned, "--rank", 2, "--preset", "attn-qkvo", "--out", out)
    run(capsys, "inspect", out, "--base", path)


def test_processes_that_unpack_one_file_at_once_do_not_disturb_each_other(single, tmp_path):
    path = Path(shutil.copy(single[0], tmp_path / "fresh.safetensors"))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = {*pool.map(unpacked, [path] * 3)}
    (folder,) = folders
    assert StableDiffusion.from_pretrained(folder).params.keys() >= {"unet", "vae"}
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_a_single_file_needs_is_said(single, tmp_path, capsys, monkeypatch):
    path, _ = single
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    draw = ("--prompt", "a", "--num_steps", 1, "--out", tmp_path / "a")
    said = run(capsys, "sample", path, *draw, code=2)
    assert f"{path}: holds no tokenizer" in said and "give --tokenizer DIR" in said
    lacking = {k: v for k, v in load_file(path).items() if not k.startswith("first_stage_model.")}
    bare = write(tmp_path / "bare.safetensors", lacking)
    assert f"{bare}: has no such part, expected the vae" in run(
        capsys, "sample", bare, *draw, code=2
    )
    wrong = ("--prediction_type", "epsilon")
    assert "is for bases that are single files" in run(
        capsys, "sample", "tiny-sd", *draw, *wrong, code=2
    )
    run(capsys, "inspect", path, "--prediction_type", "v_prediction")
    assert "v_prediction" in run(capsys, "inspect", path)  # kept
    stamps = (tmp_path / "cache" / "bases").glob("*/single_file.json")
    assert str(path) in {json.loads(stamp.read_text())["file"] for stamp in stamps}
