#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: swapping one LoRA in place empties others whose name contains its name.
#
# Expected: load_lora_adapter(FILE, adapter_name="anna", hotswap=True) replaces the weights of "anna" only.
# Seen:     the adapters "anna2" and "joanna" of the same UNet are all zeros afterwards; "bob" is untouched.
#           Weights that the new file has no key for are set to zero, and those are looked for by `name in key`, so
#           adapters whose name has the swapped one's as a part go with it.
# Matters:  a server that keeps several people's LoRAs and swaps one draws the others from the bare base from then
#           on, without a word. Names of equal length that differ ("own00", "own01") are safe, "own1" beside "own10"
#           is not.
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
)


def file():
    return {
        f"unet.{LAYER}.lora_A.weight": torch.randn(4, 8),
        f"unet.{LAYER}.lora_B.weight": torch.randn(8, 4),
    }


def changes():
    """Norm of the change of one layer's weight, by adapter."""
    layer = unet.get_submodule(LAYER)
    return {name: round(float(layer.get_delta_weight(name).norm()), 2) for name in layer.lora_A}


for name in ("anna", "anna2", "joanna", "bob"):
    unet.load_lora_adapter(file(), prefix="unet", adapter_name=name)
before = changes()
unet.load_lora_adapter(file(), prefix="unet", adapter_name="anna", hotswap=True)
after = changes()
print("loaded:            ", before)
print("'anna' swapped:    ", after)
assert min(before.values()) > 0 and after["anna"] not in (0, before["anna"])
assert after["anna2"] == after["joanna"] == 0 and after["bob"] == before["bob"]
PY
