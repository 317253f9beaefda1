#!/usr/bin/env bash
# diffusers 0.42.1 with torch 2.13.0: a UNet exported with a free batch takes at most 63 pictures.
#
# Expected: torch.export.export of a UNet with a batch of any size (Dim("batch")) works, as each layer treats pictures
#           one by one; or, where the exporter chooses the range, the program takes 64.
# Seen:     Dim("batch") ends in "Constraints violated", Dim.DYNAMIC gives a program for 2...63 pictures that refuses 64
#           when it is run. The upsampling layer asks `if batch >= 64` (a way around an old limit of CUDA kernels),
#           and the trace keeps the branch it took. Guidance doubles the batch: 32 pictures are too many.
# Matters:  ONNX files and AOT packages of a UNet made for serving get the limit without anybody asking for it, and
#           meet it at the first large batch. Export from a UNet whose upsampling has no such question, or split.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import torch
from diffusers import UNet2DConditionModel
from torch.export import Dim, export

unet = UNet2DConditionModel(
    block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
    cross_attention_dim=16, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval().requires_grad_(False)


def inputs(count):
    return torch.randn(count, 4, 8, 8), torch.ones(count), torch.randn(count, 5, 16)


def exported(dim):
    names = ("sample", "timestep", "encoder_hidden_states")
    return export(unet, inputs(2), dynamic_shapes={name: {0: dim} for name in names})


try:
    exported(Dim("batch"))
    named = "exported"
except Exception as error:
    named = str(error)
print("Dim('batch'):", named.split("!")[0], "|", "max=63" if "max=63" in named else "no range named")
program = exported(Dim.DYNAMIC).module()
taken = {}
for count in (3, 63, 64):
    unet(*inputs(count))
    try:
        program(*inputs(count))
        taken[count] = "draws"
    except Exception as error:
        taken[count] = str(error)
for count, result in taken.items():
    print(f"Dim.DYNAMIC, {count} pictures: {result} (PyTorch: draws)")
assert "Constraints violated" in named and "max=63" in named
assert taken[3] == taken[63] == "draws" and "<= 63" in taken[64]
PY
