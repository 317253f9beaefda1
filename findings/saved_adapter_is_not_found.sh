#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: what unet.save_lora_adapter(FOLDER) writes, no reader takes by its defaults.
#
# Expected: unet.load_lora_adapter(FOLDER, prefix=None) reads what unet.save_lora_adapter(FOLDER) wrote, and
#           load_lora_weights(FOLDER) of the pipeline loads that file, which has the name it looks for.
# Seen:     the UNet looks for pytorch_lora_weights.bin, which the saving half never writes unless asked, and raises
#           OSError; use_safetensors=True is needed. The pipeline reads the file, finds no key that begins with
#           "unet.", logs a warning that calls this safe to ignore, and goes on without a LoRA.
# Matters:  both halves are in one class; whoever trains with the first finds at the end of a run that the second
#           refuses the folder, or draws pictures of the bare base and blames the training. Files of both kinds bear
#           one name, so a loader has to look at the keys.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import os

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig


def new_unet():
    return UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def layers(unet):
    return sum(hasattr(module, "lora_A") for module in unet.modules())


trained = new_unet()
trained.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "one")
trained.save_lora_adapter("saved", adapter_name="one")
print("saved:", os.listdir("saved"), "layers:", layers(trained))
try:
    new_unet().load_lora_adapter("saved", prefix=None)
    reason = "loads"
except OSError as error:
    reason = str(error)
print("unet.load_lora_adapter:", reason)
named = new_unet()
named.load_lora_adapter("saved", prefix=None, use_safetensors=True)
print("with use_safetensors=True, layers:", layers(named))
pipeline = StableDiffusionPipeline(
    unet=new_unet(), vae=None, text_encoder=None, tokenizer=None, scheduler=None,
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)
pipeline.load_lora_weights("saved")
print("pipeline.load_lora_weights, layers:", layers(pipeline.unet))
assert "no file named pytorch_lora_weights.bin" in reason
assert layers(trained) == layers(named) == 8 and layers(pipeline.unet) == 0
PY
