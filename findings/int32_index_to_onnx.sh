#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2 and onnxruntime 1.32.0: a table looked up by int32 leaves as an invalid ONNX file.
#
# Expected: torch.onnx.export(dynamo=True) of `table[steps]` with int32 steps gives a file that ONNX Runtime opens, as
#           for int64 steps; PyTorch takes both.
# Seen:     the export succeeds, without a warning, and writes GatherND with int32 indices; ONNX knows int64 alone
#           there. onnx.checker and ONNX Runtime both refuse the file. torch.nn.Embedding with int32 is right.
# Matters:  samplers look up their noise levels by timestep, and timesteps from JAX or C++ are int32. The
#           model works until somebody opens the file. Say steps.long() in forward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import onnx
import onnxruntime
import torch


class NoiseLevel(torch.nn.Module):
    """Noise level of each of a batch's timesteps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("levels", torch.linspace(1, 0, 1000))

    def forward(self, steps):
        return self.levels[steps]


class Long(NoiseLevel):
    def forward(self, steps):
        return super().forward(steps.long())


def outcome(model, dtype):
    steps = torch.tensor([999, 0, 500], dtype=dtype)
    program = torch.onnx.export(model.eval(), (steps,), dynamo=True, verbose=False)
    program.save("levels.onnx")
    try:
        onnx.checker.check_model("levels.onnx", full_check=True)
        checked = "valid"
    except Exception as error:
        checked = "invalid: " + str(error)
    try:
        session = onnxruntime.InferenceSession("levels.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: steps.numpy()})[0]
        ran = "same numbers" if (found == model(steps).numpy()).all() else "other numbers"
    except Exception as error:
        ran = "refused: " + str(error)
    return checked, ran


found = {
    "int64": outcome(NoiseLevel(), torch.int64),
    "int32": outcome(NoiseLevel(), torch.int32),
    "int32, long() in forward": outcome(Long(), torch.int32),
}
for case, (checked, ran) in found.items():
    print(f"{case}: {checked} | {ran}")
good = ("valid", "same numbers")
assert found["int64"] == found["int32, long() in forward"] == good
assert found["int32"][0].startswith("invalid") and "tensor(int32)" in found["int32"][1]
assert "GatherND" in found["int32"][1]
PY
