#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: one call with scale 0 sets all LoRAs back to full strength.
#
# Expected: cross_attention_kwargs={"scale": s} holds for one call; the weights given by set_adapters stay as they are.
# Seen:     that is so for every s but 0: after one call at 0 two LoRAs at 0.5 and 0.25 are both at 1.0, and all
#           later pictures are drawn so. Dividing by the scale is not possible at 0, so 1 is written instead.
# Matters:  "with and without LoRA" side by side is drawn by a call at 0. Whoever mixes LoRAs (0.5 of a face, 0.25 of a
#           style) or turns one down draws something else from then on, without a word. disable_lora() and
#           enable_lora() keep the weights.
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
).eval().requires_grad_(False)
for name in ("face", "style"):
    weights = {"A": torch.randn(4, 8), "B": torch.randn(8, 4)}
    unet.load_lora_adapter(
        {f"unet.{LAYER}.lora_{part}.weight": value for part, value in weights.items()},
        prefix="unet", adapter_name=name,
    )
noise, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)


def draw(**options):
    return unet(noise, 1, prompt, **options).sample


unet.set_adapters(["face", "style"], [0.5, 0.25])
before = draw()
found, moved = {}, {}
for scale in (2.0, 0.5, 0.0):
    draw(cross_attention_kwargs={"scale": scale})
    found[scale] = dict(unet.get_submodule(LAYER).scaling)
    moved[scale] = float((draw() - before).abs().max())
    print(f"weights after a call at {scale}: {found[scale]}, later outputs move by {moved[scale]:.1e}")
assert found[2.0] == found[0.5] == {"face": 0.5, "style": 0.25} and moved[2.0] == moved[0.5] == 0
assert found[0.0] == {"face": 1.0, "style": 1.0} and moved[0.0] > 1e-3
PY
