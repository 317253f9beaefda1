#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0: a pipeline saved in float16 cannot be used as it is loaded.
#
# Expected: StableDiffusionPipeline.from_pretrained(FOLDER) without a dtype gives all parts in one dtype,
#           and the pipeline draws.
# Seen:     transformers 5 loads a model in the dtype of its file unless told otherwise, diffusers loads its own
#           in float32: the text encoder is float16, UNet and autoencoder float32, and the first call ends in
#           "mat1 and mat2 must have the same dtype".
# Matters:  most bases are published in float16; whoever follows a tutorial without a dtype, on a CPU say,
#           gets this error from files that are sound. Name the dtype.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import json
import pathlib
import string

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

words = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
words += ["<|startoftext|>", "<|endoftext|>"]
pathlib.Path("vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
pathlib.Path("merges.txt").write_text("#version: 0.2\n")
text = CLIPTextConfig(
    vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=16, bos_token_id=52, eos_token_id=53,
)
blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
pipeline = StableDiffusionPipeline(
    unet=UNet2DConditionModel(
        **blocks, sample_size=8, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    vae=AutoencoderKL(
        **blocks, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    text_encoder=CLIPTextModel(text),
    tokenizer=CLIPTokenizer("vocab.json", "merges.txt", model_max_length=16),
    scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
    requires_safety_checker=False,
)
pipeline.to(torch.float16).save_pretrained("saved")
loaded = StableDiffusionPipeline.from_pretrained("saved", safety_checker=None)
found = {name: str(getattr(loaded, name).dtype) for name in ("unet", "vae", "text_encoder")}
print("loaded without a dtype:", found)
try:
    loaded("abc", num_inference_steps=1)
    reason = "draws"
except RuntimeError as error:
    reason = str(error)
print("first call:", reason)
named = StableDiffusionPipeline.from_pretrained("saved", safety_checker=None, dtype=torch.float32)
named("abc", num_inference_steps=1)
print("with dtype=torch.float32: draws")
assert found == {"unet": "torch.float32", "vae": "torch.float32", "text_encoder": "torch.float16"}
assert "same dtype" in reason
PY
