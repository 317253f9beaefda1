#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0, peft 0.21.2: text encoder LoRAs of yesterday lose their layers' alphas.
#
# Expected: a file that diffusers wrote with transformers 4 is applied as its header says, rank and alpha of each layer.
# Seen:     transformers 5 has no "text_model." in the names of CLIPTextModel. diffusers takes it off the tensors' names,
#           not off those in the header's rank_pattern and alpha_pattern. An alpha by layer is ignored (a layer of
#           alpha 1 is applied at 4, four times too strong, without a warning); a rank by layer ends in an error about
#           sizes. The same file with the new names in its header is right.
# Matters:  files with a config in their header were meant to be the safe ones. They need to be written again, or read
#           with both spellings; SDXL's second encoder keeps "text_model." in transformers 5.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import json

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

LAYER = "encoder.layers.0.self_attn."


def applied(rank, prefix):
    """Strengths of two layers (alpha 4 and 1) whose config names the second with the prefix; 1 is right."""
    second = prefix + LAYER + "k_proj"
    config = {
        "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"],
        "alpha_pattern": {second: 1}, "rank_pattern": {second: rank} if rank != 4 else {},
    }
    tensors, wanted = {}, {}
    for name, size, alpha in (("q_proj", 4, 4), ("k_proj", rank, 1)):
        down, up = torch.randn(size, 16), torch.randn(16, size)
        stem = f"text_encoder.text_model.{LAYER}{name}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        wanted[name] = up @ down * alpha / size
    header = json.dumps({f"text_encoder.{key}": value for key, value in config.items()})
    save_file(tensors, "lora.safetensors", {"format": "pt", "lora_adapter_metadata": header})
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=52, eos_token_id=53,
    ))
    pipeline = StableDiffusionPipeline(
        unet=None, vae=None, text_encoder=encoder, tokenizer=None, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    state, alphas, metadata = pipeline.lora_state_dict(
        ".", weight_name="lora.safetensors", return_lora_metadata=True
    )
    try:
        pipeline.load_lora_into_text_encoder(
            state, alphas, encoder, adapter_name="one", metadata=metadata
        )
    except RuntimeError as error:
        return str(error).split(",")[0]
    found = {name: encoder.get_submodule(LAYER + name).get_delta_weight("one") for name in wanted}
    return [round(float((found[k] * v).sum() / (v * v).sum()), 3) for k, v in wanted.items()]


found = {
    "alpha by layer, old names": applied(4, "text_model."),
    "alpha by layer, new names": applied(4, ""),
    "rank by layer, old names": applied(2, "text_model."),
    "rank by layer, new names": applied(2, ""),
}
for case, result in found.items():
    print(f"{case}: {result}")
assert found["alpha by layer, new names"] == found["rank by layer, new names"] == [1.0, 1.0]
assert found["alpha by layer, old names"] == [1.0, 4.0]
assert "ignore_mismatched_sizes" in found["rank by layer, old names"]
PY
