#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a LoRA loaded after disable_lora() is half on.
#
# Expected: after disable_lora() a newly loaded LoRA is off, or on; all of it.
# Seen:     layers that an earlier LoRA had stay off, layers that are new are on. Here the old one has to_q, the new
#           one to_q and to_k: only its to_k draws. "Off" is kept by each wrapped layer, and a new layer starts on.
# Matters:  a page that draws with and without LoRA, and loads the next one while the switch is off, shows a picture
#           that is neither. LoRAs differ in their layers as a rule (attention only; with convolutions). Call
#           enable_lora() before loading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import torch
from diffusers import UNet2DConditionModel

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
noise, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
unet = UNet2DConditionModel(
    block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
    cross_attention_dim=16, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval().requires_grad_(False)


def load(name, *layers):
    file = {}
    for layer in layers:
        file[f"unet.{BLOCK}{layer}.lora_A.weight"] = torch.randn(4, 8)
        file[f"unet.{BLOCK}{layer}.lora_B.weight"] = torch.randn(8, 4)
    unet.load_lora_adapter(file, prefix="unet", adapter_name=name)


def draw():
    return unet(noise, 1, prompt).sample


base = draw()
load("old", "to_q")
unet.disable_lora()
assert torch.equal(draw(), base)
load("new", "to_q", "to_k")
half = draw()
off = {layer: unet.get_submodule(BLOCK + layer).disable_adapters for layer in ("to_q", "to_k")}
unet.enable_lora()
whole = draw()
unet.disable_lora()
print("off after loading:", off)
print("moved from the base: as loaded", float((half - base).abs().max()), "all on", float((whole - base).abs().max()))
assert off == {"to_q": True, "to_k": False}
assert not torch.allclose(half, base) and not torch.allclose(half, whole)
assert torch.equal(draw(), base)
PY
