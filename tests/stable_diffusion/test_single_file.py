"""Original single files. The names are written out here from diffusers' names by the inverse of
the public converters' tables, then read back; diffusers' own converter judges the UNet's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.checkpoint import flax_to_torch, param_shapes
from hyperlora_jax.stable_diffusion.families import FAMILIES
from hyperlora_jax.stable_diffusion.loading import CONSTRUCTORS
from hyperlora_jax.stable_diffusion.original_names import translate
from hyperlora_jax.stable_diffusion.single_file import _schedule, load_single_file
from hyperlora_jax.stable_diffusion.tensor_stream import read_tensors

from .conftest import tiny_text_config, tiny_unet_config, tiny_vae_config

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
        params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
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
        spare = f"transformer.resblocks.{count}.mlp.c_fc.bias"
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


TINY = {
    "sd1": {
        "unet": tiny_unet_config(cross_attention_dim=24, layers_per_block=2),
        "vae": tiny_vae_config(layers_per_block=2),
        "text_encoder": tiny_text_config(),
    },
    "sd2": {
        "unet": tiny_unet_config(use_linear_projection=True),
        "vae": tiny_vae_config(),
        "text_encoder": tiny_text_config(hidden_act="gelu"),
    },
    "sdxl": {
        "unet": tiny_unet_config(
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=56,
            transformer_layers_per_block=[1, 2],
        ),
        "vae": tiny_vae_config(),
        "text_encoder": tiny_text_config(),
        "text_encoder_2": tiny_text_config(
            hidden_act="gelu", architectures=["CLIPTextModelWithProjection"]
        ),
    },
}


@pytest.mark.parametrize("family", TINY)
def test_original_names_give_back_every_tensor(family, tmp_path):
    configs = TINY[family]
    trees = random_tensors(configs)
    tensors = original_file(configs, trees)
    path = tmp_path / "model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    _, params, schedule = load_single_file(path, jnp.float32, configs, "v_prediction")
    assert schedule.prediction_type == "v_prediction"
    assert params.keys() == trees.keys()
    same = jax.tree.map(np.array_equal, params, trees)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("width", FAMILIES)
def test_true_unets_equal_the_converter_of_diffusers(width):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = FAMILIES[width]["unet"]
    shapes = param_shapes(CONSTRUCTORS["unet"](config))
    names = flax_to_torch(jax.tree.map(lambda s: s, shapes_without_axes(shapes)))
    originals = {f"model.diffusion_model.{original_unet_name(n, config)}": n for n in names}
    converted = convert_ldm_unet_checkpoint({k: k for k in originals}, config)
    assert len(converted) == len(names)
    for new, original in converted.items():
        (target,) = translate(original, FAMILIES[width])
        assert target.name == new == originals[original]


def shapes_without_axes(shapes):
    return jax.tree.map(lambda s: np.zeros((0,) * len(s.shape)), shapes)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match=r"no cross-attention under model\.diffusion_model"):
        load_single_file(path, jnp.float32)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: np.zeros((4, 5), np.float32)}, path)
    with pytest.raises(UserError, match="text states of width 5"):
        load_single_file(path, jnp.float32)
    save_file({key: np.zeros((4, 24), np.float32), "control.x": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match=r"'control\.x' belongs to no known part"):
        load_single_file(path, jnp.float32, TINY["sd1"])


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
    path = tmp_path / "model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, header)
    schedule = load_single_file(path, jnp.float32, configs)[2]
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == expected
    assert load_single_file(path, jnp.float32, configs, "sample")[2].prediction_type == "sample"


def test_sd2_bases_are_told_by_their_step(tmp_path):
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    path = tmp_path / "model.safetensors"
    for step, expected in ((None, "v_prediction"), (875000, "epsilon"), (140000, "v_prediction")):
        tensors = {key: np.zeros((4, 1024), np.float32)}
        if step is not None:
            tensors["global_step"] = np.asarray(step, np.int64)
        save_file(tensors, path)
        found = dict(read_tensors([path]))
        assert _schedule(found, path, 1024, None).prediction_type == expected


def test_marks_that_contradict_each_other_or_mean_edm(tmp_path):
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    path, empty = tmp_path / "model.safetensors", np.zeros(0, np.float32)
    tensors = {key: np.zeros((4, 768), np.float32), "v_pred": empty}
    save_file(tensors, path, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(UserError, match=r"'v_pred' says v_prediction.*prediction_type says eps"):
        load_single_file(path, jnp.float32)
    save_file({**tensors, "edm_mean": empty}, path)
    with pytest.raises(UserError, match="'edm_mean' marks an EDM model"):
        load_single_file(path, jnp.float32)
