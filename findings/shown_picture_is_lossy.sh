#!/usr/bin/env bash
# gradio 6.31.0: the picture that a page hands out is not the one that the model drew.
#
# Expected: gr.Image() and gr.Gallery() with a picture (array or Pillow) as output offer these pixels for download.
# Seen:     the file is WebP in its lossy mode at Pillow's default quality. On coloured squares of 4 pixels single
#           values are off by more than 100 of 255. Text in the picture's info (prompt, seed) is gone.
#           format="png" keeps both.
# Matters:  people judge and keep what the page shows: faces compared by embedding, pictures used for training again,
#           a seed drawn twice to see whether it repeats. The docs name "webp" as default, not that it loses.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check gradio==6.31.0 pillow==12.3.0 numpy==2.4.6
cd "$folder"
export GRADIO_ANALYTICS_ENABLED=False GRADIO_TEMP_DIR="$folder/files"
venv/bin/python - 2>errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import gradio as gr
import numpy as np
from PIL import Image

colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
drawn = colours.repeat(4, axis=0).repeat(4, axis=1)
picture = Image.fromarray(drawn)
picture.info["parameters"] = "seed 1"


def handed_out(component, value):
    """Largest difference of the file to what was drawn (of 255), its format, whether the text is there."""
    data = component.postprocess(value)
    file = data.root[0].image.path if isinstance(component, gr.Gallery) else data.path
    with Image.open(file) as opened:
        off = np.abs(np.asarray(opened.convert("RGB")).astype(int) - drawn).max()
        return int(off), opened.format, "parameters" in opened.info


found = {
    "Image, Pillow": handed_out(gr.Image(), picture),
    "Image, array": handed_out(gr.Image(), drawn),
    "Gallery": handed_out(gr.Gallery(), [picture]),
    "Image, format=png": handed_out(gr.Image(format="png"), picture),
}
for case, result in found.items():
    print(f"{case}: (largest difference, format, text kept) {result}")
for case in ("Image, Pillow", "Image, array", "Gallery"):
    assert found[case][0] > 50 and found[case][1:] == ("WEBP", False)
assert found["Image, format=png"] == (0, "PNG", True)
PY
