#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a LoRA of mixed ranks has one strength when loaded, another when swapped in.
#
# Expected: load_lora_weights(FILE, hotswap=True) applies a file as load_lora_weights(FILE) does: each layer by
#           up · down · alpha / rank.
# Seen:     of a kohya file with alpha 4 and ranks 4, 2, 1 the layers of rank 2 and 1 come out at a half and a quarter
#           of their strength. The rank of each layer is kept by the layer's name, but is looked up by the name of the
#           weight (….to_k.lora_A.NAME.weight), which never fits; the commonest rank stands in for all.
#           The strength that set_adapters gave the slot is back at 1 as well.
# Matters:  kohya files of one alpha whose ranks differ (convolutions at another rank than attention, files resized to
#           a share of their norm) are common. Whoever serves them by swapping, as is advised for compiled models,
#           draws them too weak, and a slot's strength has to be set again after each swap.
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
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
NAMES = ("to_q", "to_k", "to_v")


def new_unet():
    return UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def kohya(ranks, alpha):
    """A file's tensors, and the change of each layer's weight that they mean."""
    file, wanted = {}, {}
    for name, rank in zip(NAMES, ranks):
        down, up = torch.randn(rank, 8), torch.randn(8, rank)
        stem = "lora_unet_" + (BLOCK + name).replace(".", "_")
        file |= {
            f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(float(alpha)),
        }
        wanted[name] = up @ down * alpha / rank
    return file, wanted


def load(unet, file, **options):
    state, network = StableDiffusionPipeline.lora_state_dict(dict(file))
    StableDiffusionPipeline.load_lora_into_unet(state, network, unet, adapter_name="one", **options)


def strengths(unet, wanted):
    """How strongly each layer's change arrives; 1 is right."""
    changes = {name: unet.get_submodule(BLOCK + name).get_delta_weight("one") for name in wanted}
    return [round(float((changes[k] * v).sum() / (v * v).sum()), 3) for k, v in wanted.items()]


first, first_wanted = kohya((4, 4, 4), 4)
equal, equal_wanted = kohya((2, 2, 2), 4)
mixed, mixed_wanted = kohya((4, 2, 1), 4)
plain = new_unet()
load(plain, mixed)
swapped = new_unet()
swapped.enable_lora_hotswap(target_rank=4)
load(swapped, first)
load(swapped, equal, hotswap=True)
found = {"mixed ranks, loaded": strengths(plain, mixed_wanted)}
found["equal ranks, swapped in"] = strengths(swapped, equal_wanted)
load(swapped, mixed, hotswap=True)
found["mixed ranks, swapped in"] = strengths(swapped, mixed_wanted)
swapped.set_adapters(["one"], [0.5])
load(swapped, first, hotswap=True)
found["slot at 0.5, swapped"] = strengths(swapped, first_wanted)
for case, values in found.items():
    print(f"{case}: {values}")
assert found == {
    "mixed ranks, loaded": [1.0, 1.0, 1.0],
    "equal ranks, swapped in": [1.0, 1.0, 1.0],
    "mixed ranks, swapped in": [1.0, 0.5, 0.25],
    "slot at 0.5, swapped": [1.0, 1.0, 1.0],
}
PY
