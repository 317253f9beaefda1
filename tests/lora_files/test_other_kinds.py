"""LoHa, LoKr and DoRA become plain LoRAs of a base: against the weights that PEFT merges."""

import copy

import numpy as np
import pytest

from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import site_factors
from hyperlora_jax.lora_files import load_lora, safetensors_io
from hyperlora_jax.lora_files.base_files import read_base_model

TARGETS = [
    "down_blocks.0.attentions.0.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.0.resnets.1.conv1",
    "up_blocks.0.resnets.0.conv_shortcut",
    "down_blocks.0.downsamplers.0.conv",
]
SIZES = {"r": 3, "target_modules": TARGETS}


def config_of(kind):
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    alpha = {"alpha": 6, "alpha_pattern": {"to_q": 1}, "init_weights": False}
    return {
        "loha": lambda: LoHaConfig(**SIZES, **alpha),
        "loha core": lambda: LoHaConfig(**SIZES, **alpha, use_effective_conv2d=True),
        "lokr": lambda: LoKrConfig(**SIZES, **alpha, decompose_both=True, decompose_factor=8),
        "lokr core": lambda: LoKrConfig(**SIZES, **alpha, use_effective_conv2d=True),
        "lokr whole": lambda: LoKrConfig(**SIZES | {"r": 64}, **alpha),
        "dora": lambda: LoraConfig(
            **SIZES, lora_alpha=6, use_dora=True, init_lora_weights=False, use_rslora=True
        ),
    }[kind]()


KINDS = ("loha", "loha core", "lokr", "lokr core", "lokr whole", "dora")


@pytest.fixture(scope="module")
def base(tmp_path_factory, sd1_modules):
    folder = tmp_path_factory.mktemp("base")
    sd1_modules["unet"].save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, tmp_path_factory, sd1_modules):
    """(PEFT folder, {layer: change of its weight})."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(0)
    unet = copy.deepcopy(sd1_modules["unet"])
    model = get_peft_model(unet, config_of(request.param)).eval()
    for name, value in model.named_parameters():
        if "magnitude" in name:
            value.data *= 1 + 0.2 * torch.randn_like(value)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    model.save_pretrained(folder)
    after = dict(model.double().merge_and_unload().named_parameters())
    before = dict(copy.deepcopy(sd1_modules["unet"]).double().named_parameters())
    changes = {
        name.removesuffix(".weight"): (after[name] - before[name]).detach().numpy()
        for name in before
        if name.endswith(".weight") and not torch.equal(after[name], before[name])
    }
    assert changes.keys() == set(TARGETS)
    return folder, changes


def deltas(lora, spec):
    found = {}
    for site in spec.sites:
        pair = site_factors(lora, site)
        delta = pair["down"].reshape(site.fan_in, site.rank) @ pair["up"]
        window = (*site.kernel_size, site.in_features, site.out_features)
        whole = delta.reshape(window).transpose(3, 2, 0, 1)
        found[site.path] = whole if site.kind == "conv" else delta.T
    return found


def differences(found, changes):
    assert found.keys() == changes.keys()
    return {
        path: np.linalg.norm(found[path] - change) / np.linalg.norm(change)
        for path, change in changes.items()
    }


def best(change, rank):
    sigma = np.linalg.svd(change.reshape(len(change), -1), compute_uv=False)
    return np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)


def test_whole_rank_is_what_peft_merges(base, adapter):
    folder, changes = adapter
    found = deltas(*load_lora(folder, read_base_model(base), rank=1000))
    assert max(differences(found, changes).values()) < 2e-6


def test_lower_rank_is_the_best_and_its_error_is_said(base, adapter, tmp_path, capsys):
    folder, changes = adapter
    out = tmp_path / "out.safetensors"
    words = ["--out", str(out), "--format", "diffusers", "--dtype", "float32"]
    assert main(["convert", str(folder), *words, "--base", str(base), "--rank", "5"]) == 0
    error = capsys.readouterr().err
    found = differences(deltas(*load_lora(out, read_base_model(base))), changes)
    wanted = {path: best(change, 5) for path, change in changes.items()}
    np.testing.assert_allclose(
        [found[path] for path in wanted], list(wanted.values()), rtol=1e-3, atol=2e-6
    )
    assert f"mean {np.mean(list(wanted.values())):.2%}, worst {max(wanted.values()):.2%}" in error


def test_header_config_and_names_of_other_trainers(base, adapter, tmp_path):
    """The same tensors with kohya's names and alphas; DoRA's magnitude as LyCORIS has it."""
    folder, changes = adapter
    tensors, _ = safetensors_io.read(folder / "adapter_model.safetensors")
    model = read_base_model(base)
    wanted = deltas(*load_lora(folder, model, rank=1000))
    renamed = {}
    for key, array in tensors.items():
        stem, part = next(
            (key[: key.index(f".{p}")], key[key.index(f".{p}") + 1 :])
            for p in ("lora_", "hada_", "lokr_")
            if f".{p}" in key
        )
        flat = "lora_unet_" + stem.removeprefix("base_model.model.").replace(".", "_")
        part = part.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        if "magnitude" in part:
            weight = changes[stem.removeprefix("base_model.model.")]
            part, array = "dora_scale", array.reshape(-1, *[1] * (weight.ndim - 1))
        alpha = 6.0 * 3**0.5 if "dora" in folder.name else 1.0 if ".to_q" in key else 6.0
        renamed |= {f"{flat}.{part}": array, f"{flat}.alpha": np.float32(alpha)}
    path = tmp_path / "kohya.safetensors"
    safetensors_io.write(path, renamed, {})
    found = deltas(*load_lora(path, model, rank=1000))
    whole = [path for path in wanted if f"lora_unet_{path.replace('.', '_')}.lokr_w1" in renamed
             and f"lora_unet_{path.replace('.', '_')}.lokr_w2" in renamed]  # fmt: skip
    for path in whole:  # LyCORIS: alpha is the rank where no factor shows one
        rank = 3 if len(whole) < len(wanted) else 64
        wanted[path] = wanted[path] * (rank / (1.0 if path.endswith("to_q") else 6.0))
    for path, change in wanted.items():
        assert np.abs(found[path] - change).max() < 2e-6 * max(1, np.abs(change).max())


def test_norm_over_the_inputs_axis(base, tmp_path, sd1_modules):
    """LyCORIS' DoRA of older files has a magnitude for every input: [1, in]."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = sd1_modules["unet"].get_submodule(name).weight.detach().numpy().astype(np.float64)
    random = np.random.default_rng(0)
    down, up = random.standard_normal((2, 64)), random.standard_normal((64, 2))
    magnitude = random.uniform(0.5, 2, (1, 64))
    path = tmp_path / "dora.safetensors"
    parts = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    stem = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{stem}.{part}": array.astype(np.float32) for part, array in parts.items()}
    safetensors_io.write(path, tensors, {})
    whole = weight + up @ down
    wanted = whole * magnitude / np.linalg.norm(whole, axis=0) - weight
    found = deltas(*load_lora(path, read_base_model(base), rank=64))[name]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_refused_without_a_base_and_where_it_does_not_fit(base, adapter, tmp_path, capsys):
    folder, _ = adapter
    with pytest.raises(UserError, match=r"LoHa is not|LoKr is not|DoRA is not"):
        load_lora(folder)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.hada_w1_"
    ones = np.ones((4, 4), np.float32)
    path = tmp_path / "bad.safetensors"
    safetensors_io.write(path, {f"{key}a": ones, f"{key}b": ones}, {})
    words = ["--out", str(tmp_path / "out"), "--format", "kohya", "--base", str(base)]
    assert main(["convert", str(path), *words]) == 2
    assert "bad.safetensors: layer mid_block" in capsys.readouterr().err
    other = key.replace("mid_block_attentions_0", "down_blocks_3_attentions_0")
    safetensors_io.write(path, {f"{other}a": ones, f"{other}b": ones}, {})
    assert main(["convert", str(path), *words]) == 2
    assert "of another base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loaded_base_gives_what_its_folder_gives(base, adapter, sd1_modules):
    """`sample` and `refine` read with the weights they hold already."""
    import types

    import jax

    from hyperlora_jax.lora.sites import module_path

    folder, _ = adapter
    params = {}
    for name in TARGETS:
        weight = sd1_modules["unet"].get_submodule(name).weight.detach().numpy()
        node = params
        for part in module_path(name):
            node = node.setdefault(part, {})
        node["kernel"] = weight.transpose((1, 0) if weight.ndim == 2 else (2, 3, 1, 0))
    loaded = types.SimpleNamespace(params={"unet": jax.device_put(params)}, base_hash="")
    wanted = deltas(*load_lora(folder, read_base_model(base), rank=4))
    found = deltas(*load_lora(folder, loaded, rank=4))
    assert max(differences(found, wanted).values()) < 1e-5


def test_inspect_says_what_it_is_and_what_becomes_of_it(base, adapter, capsys):
    folder, _ = adapter
    kind = {"lo": f"Lo{folder.name[2].upper()}a", "do": "DoRA"}[folder.name[:2]]
    kind = "LoKr" if folder.name.startswith("lokr") else kind
    assert main(["inspect", str(folder), "--sites"]) == 0
    said = capsys.readouterr().out
    assert f"{kind}, peft keys" in said and f"sites       {len(TARGETS)}, " in said
    assert f"{kind} is no plain LoRA; with --base DIR" in said and "loads in" not in said
    assert all(f"  {path}  {kind}  rank" in said for path in TARGETS)
    if folder.name.startswith(("loha", "dora")):
        assert "ranks       3\n" in said
    assert main(["inspect", str(folder), "--base", str(base)]) == 0
    said = capsys.readouterr()
    assert f"{kind}, peft keys" in said.out and f"(never tried with {kind})" in said.out
    assert f"{kind} of {len(TARGETS)} layers became a LoRA of rank 32; relative" in said.err
