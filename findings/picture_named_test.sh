#!/usr/bin/env bash
# datasets 5.2.0: one picture named "..._test.png" makes all others of its folder disappear.
#
# Expected: load_dataset("imagefolder", data_dir=FOLDER) holds all pictures of FOLDER: those named for a split in that
#           split, the others in "train"; subfolders are labels.
# Seen:     as soon as one path has a word like test, dev, eval, valid or train in it, only paths with such words are
#           loaded. Of anna_1, anna_2, anna_test the last alone is left, in a split "test". Folders anna/ and dev/ give
#           dev's only; so do anna/ and bob-training/, there as "train", so that split="train" meets no error. The
#           labels are gone as well. No warning in any of them.
# Matters:  folders of subjects are named by their users ("dress test.png", a person called Val). Training then runs
#           on the rest that is left. data_files={"train": "FOLDER/**"} takes all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==12.3.0 numpy==2.4.6
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/cache"
venv/bin/python - 2>errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from PIL import Image

disable_progress_bars()


def loaded(number, names, by_files=False):
    """Pictures by split, and the labels."""
    folder = Path(f"pictures{number}")
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / name)
    options = {"data_files": {"train": f"{folder}/**"}} if by_files else {"data_dir": str(folder)}
    data = load_dataset("imagefolder", **options)
    labels = {name for split in data.values() if "label" in split.features for name in split.features["label"].names}
    return {name: len(split) for name, split in data.items()}, sorted(labels)


cases = {
    "plain names": ["anna/1.png", "anna/2.png", "bob/3.png"],
    "a file named test": ["anna_1.png", "anna_2.png", "anna_test.png"],
    "a folder named dev": ["anna/1.png", "anna/2.png", "dev/3.png"],
    "a folder named bob-training": ["anna/1.png", "anna/2.png", "bob-training/3.png"],
    "a person named Val": ["anna/1.png", "anna/2.png", "val/3.png"],
}
found = {case: loaded(number, names) for number, (case, names) in enumerate(cases.items())}
for case, result in found.items():
    print(f"{case}: {len(cases[case])} pictures, loaded: {result}")
listed = loaded("listed", cases["a file named test"], by_files=True)
print("a file named test, by data_files:", listed)
assert found["plain names"] == ({"train": 3}, ["anna", "bob"])
assert found["a file named test"] == ({"test": 1}, [])
assert found["a folder named dev"] == found["a person named Val"] == ({"validation": 1}, [])
assert found["a folder named bob-training"] == ({"train": 1}, [])
assert listed[0] == {"train": 3}
PY
