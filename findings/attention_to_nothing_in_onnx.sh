#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2 and onnxruntime 1.32.0: attention whose keys are all masked has three results.
#
# Expected: an exported attention gives what scaled_dot_product_attention gives in PyTorch: zeros, where a mask
#           leaves a query nothing to look at.
# Seen:     by default the exported file gives the mean of the very values that the mask hides (a mask of booleans), or
#           NaN (a mask of 0 and -inf). With opset_version=23, which has an Attention of its own, it gives zeros.
#           Rows that see anything at all are right in all cases.
# Matters:  sets of pictures or prompts are padded to one length and masked; the empty set (no reference picture, an
#           unconditional half of a batch) is a case of use. Checks with full sets pass, and the empty one then leaks
#           padding or other people's values into the result.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import numpy as np
import onnxruntime
import torch


class Attention(torch.nn.Module):
    def forward(self, query, key, value, mask):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


torch.manual_seed(0)
query, key, value = (torch.randn(2, 1, count, 4) for count in (3, 5, 5))
seen = torch.ones(2, 1, 3, 5, dtype=torch.bool)
seen[1] = False
masks = {"booleans": seen, "0 and -inf": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}


def outcome(mask, **options):
    inputs = (query, key, value, mask)
    program = torch.onnx.export(Attention(), inputs, dynamo=True, verbose=False, **options)
    program.save("attention.onnx")
    session = onnxruntime.InferenceSession("attention.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    found = session.run(None, dict(zip(names, (one.numpy() for one in inputs))))[0]
    wanted = Attention()(*inputs).numpy()
    assert np.allclose(found[0], wanted[0], atol=1e-5) and not wanted[1].any()
    if np.isnan(found[1]).all():
        return "NaN"
    if np.allclose(found[1], value[1].mean(1, keepdim=True).numpy(), atol=1e-5):
        return "mean of the hidden values"
    return "zeros" if not found[1].any() else "something else"


found = {
    (name, opset or "default"): outcome(mask, **({"opset_version": opset} if opset else {}))
    for name, mask in masks.items()
    for opset in (None, 23)
}
for (name, opset), result in found.items():
    print(f"mask of {name}, opset {opset}: {result} (PyTorch: zeros)")
assert found == {
    ("booleans", "default"): "mean of the hidden values",
    ("booleans", 23): "zeros",
    ("0 and -inf", "default"): "NaN",
    ("0 and -inf", 23): "zeros",
}
PY
