#!/usr/bin/env bash
# diffusers 0.42.1: a picture given as a tensor is resized by dropping pixels, whatever the filter says.
#
# Expected: VaeImageProcessor(resample="lanczos", the default).preprocess(picture, height, width) gives (nearly) the
#           same for a Pillow picture and for the same picture as a tensor or an array.
# Seen:     only Pillow pictures meet the filter. Tensors and arrays take the nearest pixel: halving stripes one pixel
#           wide gives grey from Pillow, as it should, and plain black from a tensor. `resample` changes nothing there.
# Matters:  image-to-image, inpainting and ControlNet take all three forms, and pictures out of a data loader or a
#           batch are tensors. They get jagged edges and lost hairlines, and two callers who pass one picture in
#           two forms get different results. Resize before the call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0 pillow==12.3.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

stripes = np.zeros((64, 64, 3), np.uint8)
stripes[:, 1::2] = 255
forms = {
    "Pillow": Image.fromarray(stripes),
    "tensor": torch.from_numpy(stripes).permute(2, 0, 1)[None] / 255,
    "array": stripes[None] / np.float32(255),
}
inner = {}
for filter_name in ("lanczos", "bilinear"):
    processor = VaeImageProcessor(resample=filter_name)
    same = [processor.preprocess(form) for form in forms.values()]
    assert all(torch.equal(same[0], other) for other in same)  # unresized, the forms agree
    for form, picture in forms.items():
        small = processor.preprocess(picture, height=32, width=32)[..., 4:-4]  # away from the edges
        inner[filter_name, form] = round(float(small.min()), 2), round(float(small.max()), 2)
        print(f"{filter_name}, {form}: darkest and brightest of -1...1: {inner[filter_name, form]}")
for filter_name in ("lanczos", "bilinear"):
    assert max(abs(value) for value in inner[filter_name, "Pillow"]) < 0.1
    assert inner[filter_name, "tensor"] == inner[filter_name, "array"] == (-1.0, -1.0)
PY
