#!/usr/bin/env bash
# safetensors 0.8.0 (numpy): a transposed array is saved with its numbers in the wrong places.
#
# Expected: safetensors.numpy.save_file({"w": kernel.T}, FILE) writes what kernel.T shows, or refuses, as
#           safetensors.torch.save_file does ("You are trying to save a non contiguous tensor").
# Seen:     the header has the transposed shape, the data are those of kernel as it lies in memory: the file is valid
#           and loads everywhere, with numbers that belong elsewhere. No warning. Columns cut out of a matrix
#           (w[:, :2]) are wrong likewise.
# Matters:  JAX and NumPy hold a dense kernel as (in, out), LoRA files as (out, in): `.T` is the step that every
#           converter takes. The norms are the same, so checks of norms pass; the pictures are noise. Write
#           np.ascontiguousarray(kernel.T).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
from safetensors.numpy import load_file, save_file

down = np.arange(6, dtype=np.float32).reshape(2, 3)
saved = {
    "as it is": down,
    "transposed": down.T,
    "two columns": down[:, :2],
    "transposed copy": np.ascontiguousarray(down.T),
}
save_file(saved, "lora.safetensors")
read = load_file("lora.safetensors")
right = {name: bool(np.array_equal(read[name], saved[name])) for name in saved}
print("read back as saved:", right)
print("saved:", down.T.tolist(), "read:", read["transposed"].tolist())
assert all(read[name].shape == saved[name].shape for name in saved)
assert right == {"as it is": True, "transposed": False, "two columns": False, "transposed copy": True}
assert np.array_equal(read["transposed"].ravel(), down.ravel())
PY
