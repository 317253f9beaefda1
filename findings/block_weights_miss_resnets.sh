#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a LoRA with all block weights at 0 still changes the picture.
#
# Expected: set_adapters(NAME, {"down": 0, "mid": 0, "up": 0}) turns a UNet's LoRA off, or refuses what it cannot weigh.
# Seen:     resnets of blocks without attention (the deepest of Stable Diffusion) and those of the middle stay at 1.0;
#           resnets beside attention get 0. With a LoRA on the time embedding the same call is
#           "IndexError: list index out of range".
# Matters:  block weights are how people keep a LoRA's face and drop its background. Files that train convolutions
#           too (LoCon, LoRA-C3Lier, conv_dim of kohya) are weighed in part only, without a word.
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
from peft import LoraConfig

OFF = {"down": 0.0, "mid": 0.0, "up": 0.0}
noise, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)


def weighed(*layers):
    """Weights of a LoRA's layers with all blocks off, and by how much it still moves the output."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval().requires_grad_(False)
    base = unet(noise, 1, prompt).sample
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(layers), init_lora_weights=False)
    unet.add_adapter(config, "one")
    unet.set_adapters("one", OFF)
    weights = {
        name: layer.scaling["one"]
        for name, layer in unet.named_modules()
        if "one" in getattr(layer, "scaling", {})
    }
    return weights, float((unet(noise, 1, prompt).sample - base).abs().max())


for layers in (("to_q", "to_v"), ("to_q", "conv1")):
    weights, moved = weighed(*layers)
    on = sorted(name for name, weight in weights.items() if weight)
    print(f"LoRA on {', '.join(layers)}: {len(on)} of {len(weights)} layers at 1, output moves by {moved:.1e}")
    print("   ", *on)
assert moved > 1e-3 and all(weights[name] == 1 and ".resnets." in name for name in on)
assert {name.split(".resnets")[0] for name in on} == {"down_blocks.1", "mid_block", "up_blocks.0"}
assert weighed("to_q", "to_v")[1] == 0
try:
    weighed("to_q", "linear_1")
    reason = "is weighed"
except IndexError as error:
    reason = f"IndexError: {error}"
print("LoRA on to_q, linear_1:", reason)
assert reason == "IndexError: list index out of range"
PY
