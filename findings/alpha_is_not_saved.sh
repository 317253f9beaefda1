#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a LoRA saved by the pipeline is loaded at another strength than it was trained at.
#
# Expected: StableDiffusionPipeline.save_lora_weights(FOLDER, unet_lora_layers=get_peft_model_state_dict(unet)) and
#           load_lora_weights(FOLDER) give the model that was trained.
# Seen:     with LoraConfig(r=4, lora_alpha=8) the loaded LoRA has half of its strength, with lora_alpha=1 four times;
#           the tensors are the same to the bit. The file holds no alpha, and one without is read as alpha = rank. Only
#           unet_lora_adapter_metadata=unet.peft_config[NAME].to_dict() saves it.
# Matters:  many trainers take an alpha that is not the rank. The file gives no hint that something is missing; nobody who
#           reads it later, with any tool, can find the right strength.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def new_unet():
    return UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8,
        cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def kept(alpha, folder, with_config):
    """Share of a trained layer's change that is there after saving and loading."""
    trained = new_unet()
    trained.add_adapter(
        LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q"], init_lora_weights=False), "one"
    )
    config = {"unet_lora_adapter_metadata": trained.peft_config["one"].to_dict()}
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(trained, adapter_name="one"),
        **(config if with_config else {}),
    )
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        folder, weight_name="pytorch_lora_weights.safetensors", return_lora_metadata=True
    )
    loaded = new_unet()
    StableDiffusionPipeline.load_lora_into_unet(
        state, alphas, loaded, adapter_name="one", metadata=metadata
    )
    before, after = (unet.get_submodule(LAYER) for unet in (trained, loaded))
    same = (before.lora_A["one"].weight == after.lora_A["one"].weight).all()
    same &= (before.lora_B["one"].weight == after.lora_B["one"].weight).all()
    ratio = after.get_delta_weight("one").norm() / before.get_delta_weight("one").norm()
    return bool(same), round(float(ratio), 3)


found = {alpha: kept(alpha, f"plain{alpha}", False) for alpha in (4, 8, 1)}
for alpha, (same, ratio) in found.items():
    print(f"rank 4, alpha {alpha}: tensors same {same}, strength after loading {ratio}")
with_config = kept(8, "config", True)
print("rank 4, alpha 8, saved with its config:", with_config)
assert found == {4: (True, 1.0), 8: (True, 0.5), 1: (True, 4.0)} and with_config == (True, 1.0)
PY
