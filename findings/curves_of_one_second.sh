#!/usr/bin/env bash
# tensorboardX 2.6.5: two writers that start in one folder within a second overwrite each other's curves.
#
# Expected: each SummaryWriter(FOLDER) writes an event file of its own, as torch.utils.tensorboard's does (process
#           number and a counter stand in its file names).
# Seen:     a file's name is second and host. Two writers of one second hold one file open, each at its own position:
#           of 5 values of the first and 3 of the second 2 and 3 are left, and no reader complains. If the second
#           starts after the first was closed, all 5 are gone.
# Matters:  train and validation writers made in two lines, the processes of one host, a job that restarts at once.
#           The curves have holes that look like training. filename_suffix keeps them apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tensorboardX==2.6.5 numpy==2.4.6 protobuf==7.36.2
cd "$folder"
venv/bin/python - <<'PY'
import struct
import time
from collections import Counter
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event


def kept(folder):
    """Values by curve in all event files of the folder."""
    found = Counter()
    for file in Path(folder).iterdir():
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            (size,) = struct.unpack_from("<Q", raw, at)
            found.update(value.tag for value in Event.FromString(raw[at + 12:at + 12 + size]).summary.value)
            at += size + 16
    return dict(found)


def trial(folder, one_after_the_other=False, second=""):
    while time.time() % 1 > 0.1:  # both writers start early in one second
        time.sleep(0.01)
    first = SummaryWriter(folder)
    for step in range(5):
        first.add_scalar("train", 1.0, step)
    if one_after_the_other:
        first.close()
    other = SummaryWriter(folder, filename_suffix=second)
    for step in range(3):
        other.add_scalar("valid", 1.0, step)
    first.close()
    other.close()
    return len(list(Path(folder).iterdir())), kept(folder)


found = {
    "both at once": trial("both"),
    "one after the other": trial("turns", one_after_the_other=True),
    "with a suffix": trial("suffix", second=".valid"),
}
for case, (files, values) in found.items():
    print(f"{case}: {files} file(s), values kept: {values} (written: 5 and 3)")
assert found["with a suffix"] == (2, {"train": 5, "valid": 3})
assert found["both at once"][0] == 1 and sum(found["both at once"][1].values()) < 8
assert found["one after the other"] == (1, {"valid": 3})
PY
