#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter makes a rank-stabilised LoRA stronger by the root of the new rank.
#
# Expected: add_weighted_adapter(["a", "b"], [1, 0.5], "mix", combination_type="cat") changes each weight by a's change
#           plus half of b's, whatever the settings of a and b ("cat" is exact; "svd" is too if the rank suffices).
# Seen:     exact for plain LoRAs. If the first adapter has use_rslora=True the mix is 2.83 times too strong by "cat"
#           (root of rank 4 + 4) and twice by "svd" (root of rank 4), also for one adapter with weight 1. The factors
#           already hold the strengths and alpha = rank is set to leave them alone, but use_rslora is taken over
#           from the first adapter, so alpha / root(rank) is applied. The order of the names decides.
# Matters:  merging LoRAs is daily work; rsLoRA is one switch in a training script. The result is burnt, and what is
#           saved from it as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install peft==0.21.2
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import torch
from peft import LoraConfig, get_peft_model


def strength(names, weights, kind):
    """Strength of a mix; 1 is the sum that was asked for."""
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(32, 32)),
        LoraConfig(r=4, target_modules=["0"], init_lora_weights=False), "plain",
    )
    model.add_adapter(
        "stable", LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_rslora=True)
    )
    model.add_weighted_adapter(names, weights, "mix", combination_type=kind)
    layer = model.base_model.model[0]
    wanted = sum(w * layer.get_delta_weight(name) for name, w in zip(names, weights))
    return round(float((layer.get_delta_weight("mix") * wanted).sum() / (wanted * wanted).sum()), 2)


torch.manual_seed(0)
cases = {
    "plain alone, svd": (["plain"], [1.0], "svd"),
    "plain + stable/2, cat": (["plain", "stable"], [1.0, 0.5], "cat"),
    "stable/2 + plain, cat": (["stable", "plain"], [0.5, 1.0], "cat"),
    "stable alone, cat": (["stable"], [1.0], "cat"),
    "stable alone, svd": (["stable"], [1.0], "svd"),
}
found = {name: strength(*case) for name, case in cases.items()}
for name, value in found.items():
    print(f"{name}: {value}")
assert list(found.values()) == [1.0, 1.0, 2.83, 2.0, 2.0]
PY
