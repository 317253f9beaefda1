"""A small CLIP tokenizer for a base model of one's own: byte-pair merges learned from captions.

The files (vocab.json, merges.txt, tokenizer_config.json) are those of every Stable Diffusion
checkpoint, so that transformers' CLIPTokenizer reads them. All 256 bytes are in the vocabulary: any
prompt can be encoded; words of the captions become one token each.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from hyperlora_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(
    captions: Iterable[str], directory: Path, model_max_length: int = 16, vocab_size: int = 1024
) -> int:
    """Learns the merges and writes the tokenizer's files into `directory`.

    Args:
        captions: texts whose words deserve their own tokens.
        model_max_length: tokens of a prompt, start and end included.
        vocab_size: upper bound; merges stop earlier when every word is one token.

    Returns:
        Number of tokens.

    Raises:
        UserError: there is no caption.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    texts = [text.lower() for text in captions]
    if not texts:
        raise UserError("captions: found none, expected at least one to learn a tokenizer from")
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", fuse_unk=False))
    # The words that CLIP's own tokenizer makes, as bytes written with printable letters.
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2 - len(letters),
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [token for token in ("".join(pair) for pair in merges) if token not in tokens]
    tokens += [START, END]
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    _write(directory / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    _write(directory / "merges.txt", "\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model_max_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    _write(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return len(vocab)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
