#!/usr/bin/env bash
# lycoris-lora 4.1.3: merging a LoHa or a LoKr gives it another strength than the one it draws at.
#
# Expected: network.merge_to() writes into the weights what the applied network adds, so that both draw the same; it
#           does so for LoCon.
# Seen:     a LoHa with alpha 1 at dim 4 is merged at a quarter of its strength, with alpha 8 at twice. LoKr (with a
#           decomposed factor) too. alpha / dim is in the change of the weight already, and merging multiplies it again.
#           With alpha = dim the two agree.
# Matters:  an alpha below the dim is the common choice for both kinds. A merged base is too weak or burnt, and as the
#           merge is the last step before a model is shared, nobody looks again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install lycoris-lora==4.1.3
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import logging

import torch
from lycoris import LycorisNetwork, create_lycoris

logging.disable(logging.WARNING)
LycorisNetwork.apply_preset({"target_module": ["Linear"]})
DIM = 4


@torch.no_grad()
def share(algorithm, alpha, **options):
    """Merged change by applied change of a layer: 1 is right."""
    torch.manual_seed(0)
    layer, sample = torch.nn.Linear(256, 256), torch.randn(8, 256)
    model = torch.nn.Sequential(layer)
    base = model(sample)
    network = create_lycoris(
        model, 1.0, linear_dim=DIM, linear_alpha=alpha, algo=algorithm, **options
    )
    network.apply_to()
    for weight in network.parameters():
        weight.normal_(std=0.5)
    applied = model(sample) - base
    network.restore()
    assert torch.equal(model(sample), base)
    network.merge_to(1.0)
    merged = model(sample) - base
    ratio = float((merged * applied).sum() / (applied * applied).sum())
    assert float((merged - ratio * applied).abs().max() / applied.abs().max()) < 1e-3
    return round(ratio, 3)


kinds = {"locon": {}, "loha": {}, "lokr": {"factor": 16}}
found = {kind: {alpha: share(kind, alpha, **more) for alpha in (1, 4, 8)} for kind, more in kinds.items()}
for kind, ratios in found.items():
    print(f"{kind}, merged / applied by alpha (dim {DIM}):", ratios)
assert found["locon"] == {1: 1.0, 4: 1.0, 8: 1.0}
assert found["loha"] == {1: 0.25, 4: 1.0, 8: 2.0}
assert found["lokr"] == {1: 0.25, 4: 1.0, 8: 2.0}
PY
