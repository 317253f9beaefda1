#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: fuse_lora(lora_scale=0.5) a second time fuses a quarter.
#
# Expected: unfuse_lora() undoes fuse_lora(lora_scale=0.5): the LoRA is at strength 1 again, and the same call fuses
#           the same weights again.
# Seen:     the base's weights come back, the LoRA stays at 0.5; fused again with 0.5 it adds 0.25, then 0.125. The
#           scale is multiplied onto what is there, and nothing takes it off.
# Matters:  comparing strengths in a loop of fuse, draw, unfuse gives products of all strengths so far, and a picture
#           drawn after unfuse_lora() is not that from before. set_adapters(NAME, 1.0) before each fuse helps.
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

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
unet = UNet2DConditionModel(
    block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
    cross_attention_dim=16, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).requires_grad_(False)
down, up = torch.randn(4, 8), torch.randn(8, 4)
base = unet.get_submodule(LAYER).weight.clone()
unet.load_lora_adapter(
    {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up},
    prefix="unet", adapter_name="one",
)
layer = unet.get_submodule(LAYER)
change = up @ down


def share(weight):
    return round(float(((weight - base) * change).sum() / (change * change).sum()), 4)


fused, unfused = [], []
for _ in range(3):
    unet.fuse_lora(lora_scale=0.5)
    fused.append(share(layer.base_layer.weight))
    unet.unfuse_lora()
    unfused.append((share(layer.base_layer.weight), layer.scaling["one"]))
print("fused with 0.5, three times:", fused)
print("unfused (share left in the weights, strength of the LoRA):", unfused)
assert fused == [0.5, 0.25, 0.125]
assert [strength for _, strength in unfused] == [0.5, 0.25, 0.125]
assert all(abs(left) < 1e-4 for left, _ in unfused)
PY
