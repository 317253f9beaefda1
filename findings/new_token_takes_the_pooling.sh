#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0: a textual inversion hides the prompt's end from SDXL's pooled state.
#
# Expected: the pooled state of SDXL's second encoder is that of the end token, the only one that has seen the
#           whole prompt; load_textual_inversion adds a word and leaves that as it is.
# Seen:     with eos_token_id=2 in the encoder's config (published SDXL folders have it) the pooled state is taken at
#           the largest id. A new word's id is above the end token's, so it is taken at the word, and all that follows
#           is not in it: "a <b> c" and "a <b> z" have the same pooled state. A word whose vector is a copy of an
#           old word's changes the state. With the true id in the config all is as expected. No warning.
# Matters:  SDXL's UNet gets the pooled state at every step. With an inversion early in the prompt style words at the
#           end lose half of their way in. Set text_encoder_2.text_model.eos_token_id to the tokenizer's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import json
from pathlib import Path
from string import ascii_lowercase as LETTERS

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
Path("vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
Path("merges.txt").write_text("#version: 0.2\n")
START, END, B = (words.index(word) for word in ("<|startoftext|>", "<|endoftext|>", "b</w>"))


def pooled(end_in_config):
    """Pooled states by prompt; <b> is a new word with b's vector."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
             "num_attention_heads": 2, "max_position_embeddings": 16, "projection_dim": 16, "bos_token_id": START}
    first = CLIPTextModel(CLIPTextConfig(**sizes, eos_token_id=END)).eval()
    second = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, eos_token_id=end_in_config)).eval()
    tokenizers = [CLIPTokenizer("vocab.json", "merges.txt", model_max_length=16) for _ in range(2)]
    pipeline = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=first, text_encoder_2=second,
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
    )
    for encoder, tokenizer in ((first, tokenizers[0]), (second, tokenizers[1])):
        vector = encoder.get_input_embeddings().weight[B].detach().clone()
        pipeline.load_textual_inversion({"vector": vector}, token="<b>", text_encoder=encoder, tokenizer=tokenizer)
    with torch.no_grad():
        return {prompt: pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[2]
                for prompt in ("a b c", "a b z", "a <b> c", "a <b> z")}


def apart(states, one, other):
    return round(float((states[one] - states[other]).abs().max()), 4)


found = {}
for end in (2, END):
    states = pooled(end)
    found[end] = (apart(states, "a b c", "a b z"), apart(states, "a <b> c", "a <b> z"),
                  apart(states, "a b c", "a <b> c"))
    print(f"eos_token_id={end}: another last word moves the pooled state by {found[end][0]}, behind a new word by "
          f"{found[end][1]}; old word to new word with the same vector: {found[end][2]}")
assert found[2][0] > 0.01 and found[2][1] == 0 and found[2][2] > 0.01
assert found[END][0] > 0.01 and found[END][1] > 0.01 and found[END][2] < 1e-4
PY
