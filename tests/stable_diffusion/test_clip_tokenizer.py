"""The tokenizer without transformers: the ids of transformers' CLIPTokenizer, for every form."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion.weights.clip_tokenizer import load_tokenizer, token_ids

PIECES = (
    "a photo of", "Anna's", "don't", "they're", "I'll", "<|endoftext|>", "<|startoftext|>", "!",
    " <|endoftext|>x", "<|ENDOFTEXT|>", "naïve", "e\u0301", "漢字", "🙂🙃", "\t\n", "  ", "12345",
    "x2", "--", "A.B,C", "\u200b", "\x00", "ﬁ", "İ", "ß", "</w>", "__", "½", "\u00a0", "a" * 50,
)  # fmt: skip
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False}
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


def texts():
    draw = random.Random(0)
    joined = [glue.join(draw.choices(PIECES, k=draw.randint(1, 12)))
              for glue in (" ", "") for _ in range(150)]  # fmt: skip
    spans = ((32, 127), (160, 0x2FFF), (0x1F300, 0x1FAFF))
    letters = ["".join(chr(draw.randrange(*draw.choice(spans))) for _ in range(20))
               for _ in range(200)]  # fmt: skip
    return ["", " ", *PIECES, *joined, *letters]


def as_object(text, normalized=True):
    return {"__type": "AddedToken", "content": text, "normalized": normalized, **PLAIN}


def added(text, normalized=True):
    return {"content": text, "normalized": normalized, "special": True, **PLAIN}


def old_form(pad=END, **changed):
    """What Stable Diffusion 1.5 (pad: the end) and 2.1 (pad: "!") came with."""
    objects = {name: as_object(text) for name, text in SPECIAL.items()} | {"pad_token": pad}
    return {**objects, **changed}


FORMS = {
    "shipped": (None, True),
    "1.5": (old_form(), True),
    "2.1": (old_form("!"), True),
    "two plain": (old_form(unk_token=END), False),
    "not normalized": (old_form("!", bos_token=as_object(START, False)), True),
    "decoder": ({**SPECIAL, "added_tokens_decoder": {"670": added(START)}}, True),
    "with a concept": ({**SPECIAL, "added_tokens_decoder": {"672": added("<anna>")}}, False),
}


def folder(tmp_path, settings):
    target = tmp_path / "tokenizer"
    shutil.copytree(f"{base_path('tiny-sd')}/tokenizer", target)
    if settings is not None:
        whole = json.loads((target / "tokenizer.json").read_text())["model"]
        (target / "tokenizer.json").unlink()
        (target / "vocab.json").write_text(json.dumps(whole["vocab"]))
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["merges"]]
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
        kept = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}
        (target / "tokenizer_config.json").write_text(json.dumps({**kept, **settings}))
    return target


@pytest.mark.parametrize("name", FORMS)
def test_ids_are_those_of_transformers(name, tmp_path):
    from transformers import CLIPTokenizer

    settings, alone = FORMS[name]
    place = folder(tmp_path, settings)
    ours, theirs = load_tokenizer(place), CLIPTokenizer.from_pretrained(str(place))
    assert (ours._backend is not None) == alone
    assert ours.model_max_length == theirs.model_max_length
    for window in (3, 16, 77):
        expected = token_ids(theirs, texts(), window)
        found = ours.ids(texts(), window)
        assert np.array_equal(found, expected), texts()[(found != expected).any(1).argmax()]


def test_everything_else_is_transformers(tmp_path):
    ours = load_tokenizer(folder(tmp_path, None))
    assert ours.bos_token == START and len(ours) == len(ours.get_vocab())


def test_prompts_import_no_transformers():
    code = (
        "import sys, hyperlora_jax as hl\n"
        "hl.load_base('tiny-sd').encode_prompt(['a photo'])\n"
        "print({'transformers', 'torch', 'diffusers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
