"""CLIP's tokenizer by the `tokenizers` package alone: transformers takes a second to import.

Folders in the common form are read here: vocabulary and merges, four special tokens, nothing else.
Others (tokens of textual inversions, other classes) are read by transformers.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from hyperlora_jax.array_types import Int, Json, JsonDict
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers
    from transformers import CLIPTokenizer

FILES = ("tokenizer.json", "vocab.json")
LFS = b"version https://git-lfs"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@runtime_checkable
class Tokenizer(Protocol):
    """What a base needs of a tokenizer: ours, or one of transformers."""

    model_max_length: int

    def __call__(self, texts: list[str], /, **options: Any) -> Any:
        """{"input_ids": token ids of every text}."""
        ...

    def __len__(self) -> int: ...

    def save_pretrained(self, save_directory: str) -> object:
        """Writes its folder."""
        ...


class ClipTokenizer:
    """Prompts to token ids; everything else is asked of transformers' CLIPTokenizer."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._backend = folder, None
        common = _common_form(folder)
        if common is None:
            self.model_max_length = self._transformers.model_max_length
        else:
            self._backend, self._pad = _backend(*common[:-1])
            self.model_max_length = common[-1]

    def ids(self, texts: Sequence[str], window: int) -> Int[np.ndarray, "b n"]:
        """Token ids, cut or padded to `window`, start and end included."""
        if self._backend is None:
            return token_ids(self._transformers, texts, window)
        self._backend.enable_truncation(window)
        self._backend.enable_padding(length=window, pad_id=self._pad[0], pad_token=self._pad[1])
        return np.asarray(
            [encoded.ids for encoded in self._backend.encode_batch(list(texts))], np.int32
        )

    @functools.cached_property
    def _transformers(self) -> "CLIPTokenizer":
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(str(self._folder))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._transformers, name)

    def __call__(self, texts: list[str], /, **options: Any) -> Any:
        """As transformers' tokenizer is called."""
        return self._transformers(texts, **options)

    def __len__(self) -> int:
        return len(self._transformers)

    def save_pretrained(self, save_directory: str) -> object:
        """Writes its folder, as transformers does."""
        return self._transformers.save_pretrained(save_directory)


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], window: int) -> Int[np.ndarray, "b n"]:
    """Token ids, cut or padded to `window`, of a ClipTokenizer or one of transformers."""
    if isinstance(tokenizer, ClipTokenizer):
        return tokenizer.ids(texts, window)
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=window, truncation=True, return_tensors="np"
    )
    return encoded["input_ids"].astype(np.int32)


def most_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Tokens of the longest text, uncut, start and end included."""
    backend = tokenizer._backend if isinstance(tokenizer, ClipTokenizer) else None
    if backend is None:
        return max(map(len, tokenizer(list(texts), verbose=False)["input_ids"]), default=0)
    backend.no_truncation()
    backend.no_padding()
    return max((len(encoded.ids) for encoded in backend.encode_batch(list(texts))), default=0)


def _common_form(folder: Path) -> tuple[dict, list, dict[str, str], dict[str, bool], int] | None:
    """(vocabulary, merges, special tokens, which of them are normalized, model_max_length), or None
    for other forms."""
    try:
        settings = _json(folder / "tokenizer_config.json")
        texts = _json(folder / "special_tokens_map.json")
        more, told = _json(folder / "added_tokens.json"), []
        if (folder / "tokenizer.json").is_file():
            whole = _json(folder / "tokenizer.json")
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
            more |= {token["content"]: token["id"] for token in whole["added_tokens"]}
            told += whole["added_tokens"]
        else:
            vocab = _json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
        added = settings.get("added_tokens_decoder", {})
        more |= {token["content"]: int(number) for number, token in added.items()}
        given = {name: settings[name] for name in _SPECIAL}
        special = {name: _content(token) for name, token in given.items()}
        told += [*added.values(), *texts.values(), *given.values()]
        flags = [
            (token["content"], _normalized(token)) for token in told if not isinstance(token, str)
        ]
        normalized = dict.fromkeys(special.values(), False) | dict(flags)
        window: Any = settings.get("model_max_length")
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # transformers says what is wrong with it
    common = (
        settings.get("tokenizer_class") in ("CLIPTokenizer", "CLIPTokenizerFast")
        and isinstance(window, int)
        and all(isinstance(token, str) or "__type" in token for token in given.values())
        and not settings.get("add_prefix_space")
        and not {"additional_special_tokens", "extra_special_tokens", "split_special_tokens"}
        & {name for name, value in settings.items() if value}
        and all(special.get(name) == _content(value) for name, value in texts.items())
        and set(more) <= set(special.values())
        and all(vocab.get(token) == number for token, number in more.items())
        and set(special.values()) <= vocab.keys()
        and all(normalized[token] == flag for token, flag in flags)
        and all(len(pair) == 2 and "".join(pair) in vocab for pair in pairs)
    )
    if not common:
        return None
    plain = [_content(token) for token in given.values() if isinstance(token, str)]
    objects = {_content(token) for token in given.values() if not isinstance(token, str)}
    if mixed := objects.intersection(plain):  # as Stable Diffusion 1.5 has it: the last one counts
        if plain != [given["pad_token"]] or added or (folder / "tokenizer.json").is_file():
            return None
        normalized |= dict.fromkeys(mixed, False)
    return vocab, pairs, special, normalized, window


def _json(path: Path) -> JsonDict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(token: str | Json) -> str:
    return token if isinstance(token, str) else token["content"]


def _normalized(token: Json) -> bool:
    """Whether the token is found in normalized text: `<|ENDOFTEXT|>` ends a text, too."""
    if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
        raise ValueError("a special token that takes its surroundings")
    return bool(token.get("normalized"))


def _backend(
    vocab: dict, merges: list, special: dict[str, str], normalized: dict[str, bool]
) -> "tuple[tokenizers.Tokenizer, tuple[int, str]]":
    """The tokenizer, and (id, text) of what it pads with."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    start, end, unknown, pad = (special[name] for name in _SPECIAL)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
            fuse_unk=False, unk_token=unknown,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=flag) for text, flag in normalized.items()]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer, (vocab[pad], pad)


def load_tokenizer(folder: Path) -> ClipTokenizer:
    """The tokenizer of a folder.

    Raises:
        UserError: no folder, or without its vocabulary (transformers would make an empty one, and
            all prompts alike: findings/empty_vocabulary.sh).
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: folder not found, expected the tokenizer of the model")
    present = [name for name in FILES if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder}: has no vocabulary, expected {' or '.join(FILES)}")
    for name in (*present, "merges.txt"):
        if (folder / name).is_file() and (folder / name).read_bytes().startswith(LFS):
            raise UserError(f"{folder / name}: a Git LFS pointer, not the file itself")
    if present == ["vocab.json"] and not (folder / "merges.txt").is_file():
        raise UserError(f"{folder}: has vocab.json without merges.txt, expected both")
    try:
        tokenizer = ClipTokenizer(folder)
        if tokenizer.model_max_length < 3:
            raise ValueError(
                f"model_max_length is {tokenizer.model_max_length}, expected 3 or more"
            )
        tokenizer.ids(["a"], 3)
        return tokenizer
    except BaseException as error:  # tokenizers raises bare exceptions, and panics that are none
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be read as a CLIP tokenizer ({reason})") from error
