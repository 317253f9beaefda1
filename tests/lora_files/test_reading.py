import json

import ml_dtypes
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors, spec_from_shapes
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.lora_files.safetensors_io import write
from tests.lora_files.conftest import shapes_of, spec_of, torch_modules
from tests.lora_files.foreign import FORMS, random_tensors

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
SITE = BLOCK + "attn1.to_q"
KOHYA = "lora_unet_" + SITE.replace(".", "_")


def assert_deltas(lora, spec, wanted, tolerance=1e-6):
    assert {site.path for site in spec} == set(wanted)
    for site in spec:
        pair = site_factors(lora, site)
        down = np.asarray(pair["down"], np.float64).reshape(site.fan_in, site.rank)
        error = np.abs(down @ np.asarray(pair["up"], np.float64) - wanted[site.path]).max()
        assert error <= tolerance * max(1, np.abs(wanted[site.path]).max()), site.path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_family(tmp_path, family, modules, form):
    spec = spec_of(modules, "all", rank=3)
    if form == "diffusers5":
        spec = LoraSpec((*spec.component("text_encoder"), *spec.component("text_encoder_2")))
    if not form.startswith("old") and form != "diffusers5":
        extra = [r"^(conv_in|conv_out|time_embedding|add_embedding)"]
        spec = LoraSpec((*spec, *spec_from_shapes(shapes_of(modules["unet"]), extra, 3)))
    ranked = [LoraSite(s.path, s.in_features, s.out_features, 1 + i % 4, s.kind, s.kernel_size,
                       s.stride) for i, s in enumerate(spec)]  # fmt: skip
    spec = LoraSpec(tuple(ranked))
    alphas = {site.path: np.array(0.5 + i % 3, np.float32) for i, site in enumerate(spec)}
    tensors, wanted = random_tensors(spec, form, family, alphas=alphas)
    write(tmp_path / "a.safetensors", tensors, {})
    lora, found = load_lora(tmp_path / "a.safetensors")
    assert found == spec
    assert_deltas(lora, found, wanted)


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (np.array(4, np.int64), 2.0),
        (np.array([1.0], np.float32), 0.5),
        (np.array(3.0, np.float16), 1.5),
        (np.array(-2.0, ml_dtypes.bfloat16), -1.0),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_alphas_and_dtypes(tmp_path, alpha, scale, dtype):
    spec = LoraSpec((LoraSite(SITE, 6, 8, 2), LoraSite(BLOCK + "attn2.to_k", 5, 8, 2)))
    alphas = None if alpha is None else {SITE: alpha}
    tensors, wanted = random_tensors(spec, "kohya", "sd1", dtype=dtype, alphas=alphas)
    write(tmp_path / "a.safetensors", tensors, {})
    lora, found = load_lora(tmp_path / "a.safetensors")
    assert_deltas(lora, found, wanted)
    plain, _ = random_tensors(spec, "kohya", "sd1", dtype=dtype)
    up = plain[f"{KOHYA}.lora_up.weight"].astype(np.float32).T * scale
    np.testing.assert_allclose(site_factors(lora, found.by_path[SITE])["up"], up, rtol=1e-6)
    if scale == 1.0 and dtype != np.float64:
        np.testing.assert_array_equal(site_factors(lora, found.by_path[SITE])["up"], up)


def test_a_scale_key_overrides_alpha(tmp_path):
    tensors = kohya_tensors() | {f"{KOHYA}.scale": np.array(3.0, np.float32)}
    write(tmp_path / "a.safetensors", tensors, {})
    lora, spec = load_lora(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(site_factors(lora, spec.sites[0])["up"], np.full((2, 8), 3.0))


def kohya_tensors(rank=2, in_features=6, out_features=8):
    return {
        f"{KOHYA}.lora_down.weight": np.ones((rank, in_features), np.float32),
        f"{KOHYA}.lora_up.weight": np.ones((out_features, rank), np.float32),
        f"{KOHYA}.alpha": np.array(1.0, np.float32),
    }


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{KOHYA}.hada_w1_a", "LoHa is not supported"),
        (f"{KOHYA}.lokr_w1", "LoKr is not supported"),
        (f"{KOHYA}.lokr_w2_a", "LoKr is not supported"),
        (f"{KOHYA}.dora_scale", "DoRA is not supported"),
        (f"unet.{SITE}.lora_magnitude_vector", "DoRA is not supported"),
        (f"{KOHYA}.diff", "1 differences of biases, norms or weights"),
        (f"{KOHYA}.set_weight", "a replaced or reshaped weight"),
        (f"{KOHYA}.oft_R.weight", "OFT is not supported"),
        (f"{KOHYA}.lora_mid.weight", "does not fit the down factor"),
        (f"{KOHYA}.oft_blocks", "OFT is not supported"),
        (f"{KOHYA}.on_input", "IA3 is not supported"),
        (f"{KOHYA}.w_norm", "1 differences of biases, norms or weights"),
        (f"unet.{SITE}.lora_B.bias", "1 differences of biases"),
        (f"{KOHYA}.a1.weight", "GLoRA or VeRA"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "diffusion transformer"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux, SD3"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "Flux, SD3"),
        ("lora_unet_something_else.lora_down.weight", "1 of 4 keys are not understood"),
        ("model.diffusion_model.input_blocks.1.1.proj_in.weight", "are not understood"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, key, message):
    write(tmp_path / "a.safetensors", kohya_tensors() | {key: np.ones((2, 6), np.float32)}, {})
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path / "a.safetensors")


def changed(**changes):
    tensors = kohya_tensors()
    for name, value in changes.items():
        key = f"{KOHYA}.{name}" if name == "alpha" else f"{KOHYA}.{name}.weight"
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


ones = np.ones


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        ({"weight": ones((2, 2), np.float32)}, "no key belongs to a Stable Diffusion LoRA"),
        (changed(lora_up=None), "lacks its up factor"),
        (changed(lora_down=None), "lacks its down factor"),
        (changed(lora_up=ones((8, 3), np.float32)), "the ranks differ"),
        (changed(lora_up=ones((8, 2, 1, 1), np.float32)), "two 2-D or two 4-D"),
        (changed(lora_down=ones((0, 6), np.float32)), "two 2-D or two 4-D"),
        (changed(lora_down=ones(6, np.float32)), "two 2-D or two 4-D"),
        (
            changed(lora_down=ones((8, 2), np.float32), lora_up=ones((2, 8), np.float32)),
            r"rank 8 is above both sizes \(swapped factors\?\)",
        ),
        (
            changed(
                lora_down=ones((8, 2, 1, 1), np.float32), lora_up=ones((2, 8, 3, 3), np.float32)
            ),
            "swapped factors",
        ),
        (changed(lora_up=ones((8, 2), np.int32)), "has dtype int32"),
        (changed(lora_up=np.full((8, 2), np.nan, np.float16)), "has NaN or Inf"),
        (changed(lora_down=np.full((2, 6), np.inf, np.float32)), "has NaN or Inf"),
        (changed(lora_down=np.full((2, 6), 1e300)), "overflows float32"),
        (changed(alpha=np.array(0.0, np.float32)), "alpha of layer .* is 0"),
        (changed(alpha=np.array(np.nan, np.float32)), r"alpha of layer .* is nan"),
        (changed(alpha=ones(2, np.float32)), r"alpha of layer .* is \[1.0, 1.0\]"),
        (
            changed() | {f"unet.{SITE}.lora_A.weight": ones((2, 6), np.float32)},
            "both name the layer",
        ),
    ],
)
def test_wrong_contents_are_named(tmp_path, tensors, message):
    write(tmp_path / "a.safetensors", tensors, {})
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path / "a.safetensors")


def test_a_linear_1x1_pair_takes_the_kind_of_the_base(tmp_path):
    path = "mid_block.attentions.0.proj_in"
    for kind in ("linear", "conv"):
        site = LoraSite(path, 8, 8, 2, kind)
        tensors, wanted = random_tensors(LoraSpec((site,)), "kohya", "sd1")
        write(tmp_path / "a.safetensors", tensors, {})
        for other in ("linear", "conv"):
            target = LoraSpec((LoraSite(path, 8, 8, 2, other),))
            lora, spec = load_lora(tmp_path / "a.safetensors", target)
            assert spec == target
            assert_deltas(lora, spec, wanted)


def peft_folder(path, config, adapter=""):
    tensors = {
        f"base_model.model.{SITE}.lora_A{adapter}.weight": ones((2, 6), np.float32),
        f"base_model.model.{SITE}.lora_B{adapter}.weight": ones((8, 2), np.float32),
    }
    write(path / "adapter_model.safetensors", tensors, {})
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 2, "lora_alpha": 6}, 3.0),
        ({"r": 2}, 4.0),
        ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}}, 2.0),
        ({"r": 2, "lora_alpha": 4, "alpha_pattern": {r".*attn1\.to_q": 10}}, 5.0),
        ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"to_k": 10}}, 2.0),
    ],
)
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_peft_scales(tmp_path, config, scale, adapter):
    lora, spec = load_lora(peft_folder(tmp_path, config, adapter))
    up = site_factors(lora, spec.sites[0])["up"]
    np.testing.assert_allclose(up, np.full((2, 8), scale), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "but no adapter_config.json"),
        ([1], "expected a JSON object"),
        ({"r": 2, "peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"r": 2, "use_dora": True}, "use_dora = True is not supported"),
        ({"r": 2, "bias": "all"}, "bias = 'all' is not supported"),
        ({"r": 3}, "rank of .* is 3, its factors have 2"),
        ({"r": 2, "lora_alpha": "x"}, "lora_alpha 'x' of .*, expected numbers"),
    ],
)
def test_wrong_peft_folders_are_named(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        load_lora(peft_folder(tmp_path, config))


def test_a_peft_folder_without_weights_or_json(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"but no adapter_model\.safetensors"):
        load_lora(tmp_path)
    peft_folder(tmp_path, None)
    with pytest.raises(UserError, match="not a readable JSON file"):
        load_lora(tmp_path)


def test_diffusers_metadata_holds_the_scale(tmp_path):
    tensors = {
        f"unet.{SITE}.lora_A.weight": ones((2, 6), np.float32),
        f"unet.{SITE}.lora_B.weight": ones((8, 2), np.float32),
    }
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 16, "unet.target_modules": ["to_q"]})
    write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": config})
    lora, spec = load_lora(tmp_path / "a.safetensors")
    assert (site_factors(lora, spec.sites[0])["up"] == 8).all()
    write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": "[]"})
    with pytest.raises(UserError, match="lora_adapter_metadata is no JSON object"):
        load_lora(tmp_path / "a.safetensors")


def test_files_of_diffusers_own_writer(tmp_path, family, modules):
    """Real `save_lora_adapter` output, alpha in its metadata."""
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    unet = torch_modules(family)["unet"]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"],
                        init_lora_weights=False)  # fmt: skip
    unet.add_adapter(config)
    state = {f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
    fields = {f"unet.{k}": sorted(v) if isinstance(v, set) else v
              for k, v in config.to_dict().items()}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors",
              {"format": "pt", "lora_adapter_metadata": json.dumps(fields)})  # fmt: skip
    lora, spec = load_lora(tmp_path / "a.safetensors")
    wanted = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            delta = module.get_delta_weight("default").detach().double().numpy()
            order = (1, 0) if delta.ndim == 2 else (2, 3, 1, 0)
            wanted[name] = delta.transpose(order).reshape(-1, delta.shape[0])
    assert_deltas(lora, spec, wanted, 2e-6)
