#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a kohya file whose layers have different alphas is applied at wrong strengths.
#
# Expected: each layer of a kohya LoRA changes its weight by up · down · alpha / rank, with the layer's own alpha.
# Seen:     the layers with the commonest (else the first) alpha are right, the others get the strength of that alpha: with
#           alphas 4, 2, 1 at rank 4 the second layer is twice, the third four times too strong. Ranks that differ
#           under one alpha are read right.
# Matters:  LoRAs with an alpha per block or per layer (block weights, resized files) draw something else in
#           diffusers than in the tool that made them, without a warning. Whoever writes kohya files for all
#           tools gives every layer one alpha and puts the rest into the up factor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."


def applied(ranks, alphas):
    """Strength at which each layer's change arrives; 1 is right."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    file, wanted, before = {}, {}, {}
    for name, rank, alpha in zip(("to_q", "to_k", "to_v"), ranks, alphas):
        down, up = torch.randn(rank, 8), torch.randn(8, rank)
        stem = "lora_unet_" + (BLOCK + name).replace(".", "_")
        file |= {
            f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(float(alpha)),
        }
        wanted[name] = up @ down * alpha / rank
        before[name] = unet.get_submodule(BLOCK + name).weight.detach().clone()
    state, network = StableDiffusionPipeline.lora_state_dict(file)
    StableDiffusionPipeline.load_lora_into_unet(state, network, unet)
    unet.fuse_lora()
    strengths = []
    for name, change in wanted.items():
        layer = unet.get_submodule(BLOCK + name)
        found = (getattr(layer, "base_layer", layer).weight - before[name]).detach()
        strengths.append(round(float((found * change).sum() / (change**2).sum()), 3))
    return strengths


cases = {
    "one alpha": ((4, 4, 4), (4, 4, 4)),
    "one alpha, ranks differ": ((4, 2, 1), (4, 4, 4)),
    "alphas differ": ((4, 4, 4), (4, 2, 1)),
    "alpha = rank, both differ": ((4, 2, 1), (4, 2, 1)),
}
found = {name: applied(*case) for name, case in cases.items()}
for name, strengths in found.items():
    print(f"{name}: {strengths}")
assert found == {
    "one alpha": [1.0, 1.0, 1.0],
    "one alpha, ranks differ": [1.0, 1.0, 1.0],
    "alphas differ": [1.0, 2.0, 4.0],
    "alpha = rank, both differ": [1.0, 2.0, 4.0],
}
PY
