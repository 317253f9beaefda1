"""What `inspect` says of other programs' files against what PyTorch diffusers and PEFT do."""

import json
import re

import numpy as np
import pytest
import torch

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.lora_files.compatibility import inspect_lora
from hyperlora_jax.lora_files.safetensors_io import write
from hyperlora_jax.lora_files.verify import _adapted, _delta, _heard, _loaded_deltas, verify_source
from tests.lora_files.conftest import spec_of, torch_modules
from tests.lora_files.foreign import random_tensors


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def part(request):
    """(family, modules, a few sites of every kind)."""
    modules = torch_modules(request.param)
    kept, seen = [], set()
    for site in spec_of(modules, "all", 2):
        kind = (site.component, site.path.split(".")[-1], ".up_blocks" in site.path)
        if kind not in seen:
            kept.append(site)
            seen.add(kind)
    return request.param, modules, LoraSpec(tuple(kept))


def renamed(pattern, new):
    return lambda tensors, spec: {k.replace(pattern, new): v for k, v in tensors.items()}


def with_more(ending, stem_of=".lora_down.weight"):
    def add(tensors, spec):
        more = {key.replace(stem_of, ending): np.float32(2) for key in tensors if stem_of in key}
        return tensors | {key: np.array(value) for key, value in more.items()}

    return add


def half_sgm(tensors, spec):
    """The decoder under diffusers names, the rest under sgm names."""
    family = "sdxl" if any("te2" in key for key in tensors) else "sd1"
    other = random_tensors(spec, "kohya-ldm", family)[0]
    kept = {key: v for key, v in tensors.items() if "up_blocks" in key or "lora_te" in key}
    return kept | {key: v for key, v in other.items() if "output_blocks" not in key}


def flat_windows(tensors, spec):
    return {k: v.reshape(len(v), -1) if "conv1" in k else v for k, v in tensors.items()}


def flat_ups(tensors, spec):
    return {k: v.reshape(v.shape[:2]) if "lora_up" in k else v for k, v in tensors.items()}


def one_other_alpha(tensors, spec):
    alphas = {k.replace(".lora_down.weight", ".alpha"): np.array(2, np.float32) for k in tensors
              if "lora_down" in k}  # fmt: skip
    first = next(key for key in alphas if "attn1_to_q" in key)
    return tensors | alphas | {first: np.array(1, np.float32)}


def same(tensors, spec):
    return tensors


def without(pattern):
    return lambda tensors, spec: {k: v for k, v in tensors.items() if not re.search(pattern, k)}


CASES = {
    "kohya": ("kohya", same),
    "kohya, sgm names": ("kohya-ldm", same),
    "old diffusers": ("old", same),
    "comfy": ("comfy", same),
    "diffusers": ("new", same),
    "diffusers, text encoder in old names": ("mixture", same),
    "no unet.": ("new", renamed("unet.", "")),
    "alpha beside PEFT keys": ("new", with_more(".alpha", ".lora_A.weight")),
    "alphas": ("kohya", with_more(".alpha")),
    "scale": ("kohya", with_more(".scale")),
    "one other alpha": ("kohya", one_other_alpha),
    "both namings": ("kohya", half_sgm),
    "unet. and sgm names": ("comfy", renamed("diffusion_model.", "unet.")),
    "no text_model.": ("new", renamed("text_model.", "")),
    "projection": ("kohya", lambda t, s: t | {
        "lora_te2_text_projection.lora_down.weight": np.ones((2, 24), np.float32),
        "lora_te2_text_projection.lora_up.weight": np.ones((32, 2), np.float32)}),
    "name of the adapter": ("new", renamed("lora_A.weight", "lora_A.default.weight")),
    "torch.compile": ("new", renamed("unet.", "unet._orig_mod.")),
    "lora_down after unet.": ("new", lambda t, s: {
        k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in t.items()}),
    "windows flat": ("kohya", flat_windows),
    "ups flat": ("kohya", flat_ups),
    "no out_proj": ("kohya", without("out_proj")),
    "no out_proj, no MLP": ("kohya", without("out_proj|mlp")),
    "lycoris_": ("kohya", renamed("lora_unet_", "lycoris_")),
    "bundled": ("kohya", lambda t, s: t | {"bundle_emb.a.clip_l": np.ones((2, 8), np.float32)}),
}  # fmt: skip


# Layers that ComfyUI a125cd84 (2025-10-12) loaded of these files at their right strength, run apart
# (comfy/lora.py, comfy/weight_adapter): of SD 1 and of SDXL; all of them where nothing stands.
COMFY = {
    "old diffusers": (15, 15), "diffusers": (9, 15), "no unet.": (9, 15), "no text_model.": (9, 9),
    "diffusers, text encoder in old names": (11, 13), "alpha beside PEFT keys": (9, 15),
    "scale": (0, 0), "unet. and sgm names": (6, 12), "name of the adapter": (0, 0),
    "torch.compile": (0, 6), "lora_down after unet.": (9, 15),
}  # fmt: skip


def tensors_of(form, spec, family):
    if form not in ("new", "mixture"):
        return random_tensors(spec, form, family)[0]
    unet, text = spec.component("unet"), [s for s in spec if s.component != "unet"]
    kohya = random_tensors(unet, "kohya", family)[0]
    tensors = {}
    for site in unet:
        stem = f"lora_unet_{site.path.replace('.', '_')}"
        tensors[f"unet.{site.path}.lora_A.weight"] = kohya[f"{stem}.lora_down.weight"]
        tensors[f"unet.{site.path}.lora_B.weight"] = kohya[f"{stem}.lora_up.weight"]
    form = "old" if form == "mixture" else "diffusers5"
    tensors |= random_tensors(LoraSpec(tuple(text)), form, family)[0]
    return {k.replace("_2.encoder.", "_2.text_model.encoder."): v for k, v in tensors.items()}


def loaded(path, modules, wanted):
    """(status, number of layers that PyTorch gives the wanted change)."""
    try:
        with torch.no_grad(), _heard(), _adapted(modules, path):
            found = _loaded_deltas(modules)
    except UserError:
        return "none", 0
    right = [
        name for name, delta in found.items()
        if name in wanted and np.allclose(delta.reshape(-1), wanted[name].reshape(-1), atol=1e-4)
    ]  # fmt: skip
    return ("full" if len(right) == len(wanted) else "part" if right else "none"), len(right)


@pytest.mark.parametrize("case", CASES)
def test_diffusers_and_comfyui_do_what_inspect_says(tmp_path, part, case):
    family, modules, spec = part
    form, change = CASES[case]
    if case == "projection" and family != "sdxl":
        pytest.skip("only SDXL has a second text encoder")
    if form == "old" and family == "sdxl":
        spec = LoraSpec(tuple(site for site in spec if site.component != "text_encoder_2"))
    tensors = change(tensors_of(form, spec, family), spec)
    path = tmp_path / "a.safetensors"
    header = {"ss_base_model_version": "sdxl_base" if family == "sdxl" else "sd_v1"}
    write(path, tensors, header)
    report = inspect_lora(path)
    row = next(row for row in report["tools"] if row["tool"] == "diffusers")
    lora, found = load_lora(path)
    wanted = {site.path: _delta(lora, site) for site in found}
    assert (row["status"], row["num_sites"]) == loaded(path, modules, wanted)
    (row,) = (row for row in report["tools"] if row["tool"] == "ComfyUI")
    assert row["num_sites"] == COMFY.get(case, (len(found),) * 2)[family == "sdxl"]


@pytest.mark.parametrize("flat", [False, True])
def test_peft_does_what_inspect_says(tmp_path, part, flat):
    family, modules, spec = part
    spec = spec.component("unet")
    tensors = {
        f"base_model.model.{key.removeprefix('unet.')}": value
        for key, value in tensors_of("new", spec, family).items()
    }
    if flat:
        tensors = flat_windows(tensors, spec)
    write(tmp_path / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2,
              "target_modules": [site.path for site in spec]}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rows = {row["tool"]: row["status"] for row in inspect_lora(tmp_path, family)["tools"]}
    try:
        with torch.no_grad(), _heard(), _adapted({"unet": modules["unet"]}, tmp_path):
            count = len(_loaded_deltas({"unet": modules["unet"]}))
    except UserError:
        count = 0
    assert (rows["PEFT"], count) == (("none", 0) if flat else ("full", len(spec)))
    assert rows["diffusers"] == "none"


def test_the_source_is_compared_with_its_own_library(tmp_path, sd1_modules):
    spec = spec_of(sd1_modules, "w2w", 2, text=False)
    tensors = random_tensors(spec, "kohya", "sd1")[0]
    write(tmp_path / "a.safetensors", tensors, {})
    lora, found = load_lora(tmp_path / "a.safetensors")
    said = verify_source(tmp_path / "a.safetensors", sd1_modules, lora, found)
    assert said.endswith(f"diffusers reads the same ({len(spec)} of {len(spec)} layers)")
    first = site_factors(lora, found.sites[0])
    first["up"][...] *= 2
    with pytest.raises(UserError, match=f"reads it differently: layer {found.sites[0].path}"):
        verify_source(tmp_path / "a.safetensors", sd1_modules, lora, found)
    first["up"][...] /= 2
    write(tmp_path / "a.safetensors", renamed("lora_unet_", "lycoris_")(tensors, spec), {})
    said = verify_source(tmp_path / "a.safetensors", sd1_modules, lora, found)
    assert "could not be compared with diffusers, which finds no layer" in said
    write(tmp_path / "a.safetensors", one_other_alpha(tensors, spec), {})
    lora, found = load_lora(tmp_path / "a.safetensors")
    said = verify_source(tmp_path / "a.safetensors", sd1_modules, lora, found)
    assert "reads it differently" in said and "alphas differ" in said


def test_edge_of_the_rules():
    """A site for which no rule is measured is not claimed."""
    from hyperlora_jax.lora_files.compatibility import source_report

    spec = LoraSpec((LoraSite("mid_block.attentions.0.proj_in", 8, 8, 2),))
    tensors = {f"lycoris_mid_block_attentions_0_proj_in.lora_{side}.weight": np.ones((8, 8))
               for side in ("down", "up")}  # fmt: skip
    rows = {row.tool: row.status for row in source_report(tensors, {}, spec, "sdxl", True)}
    assert rows["LyCORIS"] == rows["A1111"] == "untested" and rows["diffusers"] == "none"
    assert rows["ComfyUI"] == "full"


def test_an_alpha_that_only_the_header_names_is_said(tmp_path):
    path = tmp_path / "a.safetensors"
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    factors = {f"{stem}_A.weight": np.ones((4, 8), np.float32),
               f"{stem}_B.weight": np.ones((8, 4), np.float32)}  # fmt: skip
    for header, noted in (({"lora_alpha": "16"}, True), ({"ss_network_alpha": "4"}, False)):
        write(path, factors, header)
        notes = inspect_lora(path)["notes"]
        assert any("lora_alpha = 16, its tensors do not" in note for note in notes) == noted
