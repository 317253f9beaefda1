#!/usr/bin/env bash
# transformers 5.23.0: a tokenizer folder without its vocabulary loads, and every prompt becomes the same tokens.
#
# Expected: CLIPTokenizer.from_pretrained(FOLDER) of a folder that holds tokenizer_config.json only (a download
#           that broke off, a folder copied by pattern) is an error that names the missing files.
# Seen:     a tokenizer with 2 entries is made; every letter of every prompt is the unknown token, so prompts of
#           one length have one and the same encoding. No warning.
# Matters:  a Stable Diffusion folder with such a tokenizer draws pictures that ignore the prompt, and training on
#           it learns from captions that all read alike. Loaders must look at the vocabulary themselves.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0
mkdir "$folder/tokenizer"
echo '{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}' > "$folder/tokenizer/tokenizer_config.json"
"$folder/venv/bin/python" - "$folder/tokenizer" <<'PY'
import sys

from transformers import CLIPTokenizer

tokenizer = CLIPTokenizer.from_pretrained(sys.argv[1])
first, second = (tokenizer(text).input_ids for text in ("a red cat", "two dog s"))
print("entries:", len(tokenizer))
print("'a red cat':", first)
print("'two dog s':", second)
assert len(tokenizer) == 2 and first == second
PY
