#!/usr/bin/env bash
# peft 0.21.2: loading a second file under a name that is taken gives its weights at the first file's strength.
#
# Expected: model.load_adapter(FOLDER, adapter_name=NAME) makes NAME what FOLDER says, or refuses because NAME is taken.
# Seen:     the tensors are replaced, the config is not: a LoRA trained with alpha 16 that comes after one with alpha 4
#           draws at a quarter of its strength, in the other order four times too strong. rsLoRA likewise. Nothing is
#           said; saved again it has the wrong alpha in its config for good.
# Matters:  replacing the one adapter of a service, or walking over the checkpoints of two runs to compare them, is done
#           with one name. Call delete_adapter(NAME) first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install peft==0.21.2 transformers==5.23.0
cd "$folder"
venv/bin/python - 2>errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16))


def trained(name, seed, **options):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["0"], **options))
    torch.manual_seed(seed)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            weight.data.normal_()
    model.save_pretrained(name)


def change(model):
    """Change of the layer's weight by its adapter."""
    return model.base_model.model[0].get_delta_weight("one").detach()


def share(first, second, delete=False):
    """Strength of the second file after the first under one name, 1 is right; and the alpha it is saved with."""
    model = PeftModel.from_pretrained(base(), first, adapter_name="one")
    if delete:
        model.add_adapter("other", LoraConfig(r=4, target_modules=["0"]))
        model.delete_adapter("one")
    model.load_adapter(second, adapter_name="one")
    wanted = change(PeftModel.from_pretrained(base(), second, adapter_name="one"))
    model.save_pretrained("again", selected_adapters=["one"])
    alpha = json.loads(Path("again/one/adapter_config.json").read_text())["lora_alpha"]
    return round(float((change(model) * wanted).sum() / (wanted * wanted).sum()), 3), alpha


trained("four", 1, lora_alpha=4)
trained("sixteen", 2, lora_alpha=16)
trained("rooted", 3, lora_alpha=4, use_rslora=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = {
        "alpha 4, then 16": share("four", "sixteen"),
        "alpha 16, then 4": share("sixteen", "four"),
        "alpha 4, then 4 with rsLoRA": share("four", "rooted"),
        "alpha 4, deleted, then 16": share("four", "sixteen", delete=True),
    }
for case, result in found.items():
    print(f"{case}: (strength, alpha in the saved config) {result}")
about = [str(warning.message) for warning in said if "alpha" in str(warning.message)]
print("warnings about it:", about)
assert found["alpha 4, then 16"] == (0.25, 4)
assert found["alpha 16, then 4"] == (4.0, 16)
assert found["alpha 4, then 4 with rsLoRA"] == (0.5, 4)
assert found["alpha 4, deleted, then 16"] == (1.0, 16)
assert not about
PY
