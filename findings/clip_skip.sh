#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0: StableDiffusionPipeline cannot skip layers of its text encoder.
#
# Expected: pipeline(prompt, clip_skip=1) draws from the states of one layer before the last, as its docstring says.
# Seen:     AttributeError: 'CLIPTextModel' object has no attribute 'text_model'. The pipeline takes the final norm
#           from text_encoder.text_model, and transformers 5 has the parts of that module in the encoder itself
#           (CLIPTextModelWithProjection, SDXL's second encoder, still has it).
# Matters:  most anime bases are meant for "clip skip 2"; with this pair of releases their pictures cannot be drawn
#           by the pipeline, and prompt_embeds have to be made by hand.
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
try:
    pipeline("abc", num_inference_steps=1, clip_skip=1)
    reason = "draws"
except AttributeError as error:
    reason = str(error)
print("clip_skip=1:", reason)
pipeline("abc", num_inference_steps=1)
print("without it: draws")
assert "has no attribute 'text_model'" in reason
PY
