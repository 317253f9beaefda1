"""Strict reading of the config.json files of diffusers and transformers.

Every key must be known. A key of `fixed` may hold one of the listed values or null; any other value
would change what the model computes, and is an error that names it. Keys that start with "_" and
keys that do not affect the arithmetic are ignored.

A text encoder's config.json of transformers is read here too.
"""

import json
import math
from collections.abc import Iterator, Mapping

import jax

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.layers import gelu

Config = Json
_LEAST, _MOST = 1e-12, 2**24
# What may be a list of one number per level, and of lists for a level's layers.
_NESTED = frozenset({"transformer_layers_per_block", "reverse_transformer_layers_per_block"})
_LISTS = frozenset(
    {
        "layers_per_block", "attention_head_dim", "cross_attention_dim", "only_cross_attention",
        "sample_size", "latents_mean", "latents_std",
    }
)  # fmt: skip
_MAY_BE_ZERO = frozenset(
    {
        "freq_shift", "eos_token_id", "transformer_layers_per_block", "shift_factor",
        "reverse_transformer_layers_per_block",
    }
)  # fmt: skip
_FLOATS = frozenset({"latents_mean", "latents_std", "shift_factor", "freq_shift"})
_ANY_NUMBER = frozenset({"latents_mean", "shift_factor"})


def read_config(
    config: Config, defaults: Config, fixed: Mapping[str, tuple], ignored: frozenset[str], what: str
) -> Json:
    """Values of `defaults`, overridden by `config`.

    Raises UserError for a key that is in none of the tables, and for a value of a `fixed` key that
    is neither null nor among the supported ones.
    """
    values = dict(defaults)
    for key, value in config.items():
        if key.startswith("_") or key in ignored:
            continue
        value = _tuples(value)
        if key in defaults:
            values[key] = _checked(value, defaults[key], key, what)
        elif key not in fixed:
            raise UserError(f"{what} config: key {key!r} (value {value!r}) is unknown")
        elif value is not None and value not in fixed[key]:
            raise UserError(
                f"{what} config: {key} = {value!r} is not supported, expected one of "
                f"{[*fixed[key], None]}"
            )
    return values


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _checked(value: object, default: object, key: str, what: str) -> object:
    """The value, when it is of the default's type; or a tuple of such, where there may be one for
    every level. Numbers without a default are sizes."""
    if value is None:
        return default
    like = default[0] if isinstance(default, tuple) else default
    deepest = 2 if key in _NESTED else 1 if key in _LISTS else 0
    least, most = (1, 1) if isinstance(default, tuple) else (0, deepest)
    good = (
        value != ()
        and least <= _depth(value) <= most
        and all(_fits(leaf, like, key) for leaf in _leaves(value))
    )
    if not good:
        kind = {bool: "true or false", str: "a text"}.get(type(like), "a size or a list of sizes")
        raise UserError(f"{what} config: {key} = {value!r:.80} is no value for it, expected {kind}")
    return value


def _fits(leaf: object, like: object, key: str) -> bool:
    if isinstance(like, bool | str) or (like is None and isinstance(leaf, str)):
        return like is None or type(leaf) is type(like)
    if isinstance(leaf, bool) or not isinstance(leaf, int | float):
        return False
    if key in _ANY_NUMBER:
        return math.isfinite(leaf)
    whole = isinstance(leaf, int) or isinstance(like, float) or key in _FLOATS
    return whole and (0 if key in _MAY_BE_ZERO else _LEAST) <= leaf <= _MOST


def _depth(value: object) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, tuple) else 0


def _leaves(value: object) -> Iterator[object]:
    for item in value if isinstance(value, tuple) else (value,):
        yield from _leaves(item) if isinstance(item, tuple) else (item,)


def check_divides(number: int, size: int, key: str, sizes: str, what: str) -> None:
    """Raises UserError unless `number` (of the config's `key`) divides a size of its `sizes`."""
    if size % number:
        raise UserError(f"{what} config: {key} {number} does not divide {size} of {sizes}")


def per_level(value: object, num_levels: int, key: str, what: str) -> tuple:
    """A scalar repeated for every level, or the list itself. UserError when its length differs."""
    if not isinstance(value, tuple):
        return (value,) * num_levels
    if len(value) != num_levels:
        raise UserError(f"{what} config: {key} has {len(value)} values, expected {num_levels}")
    return value


def to_json(config: Config) -> str:
    """Hashable form of a config that a module can keep."""
    return json.dumps(dict(config), sort_keys=True)


_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
    "architectures": ("CLIPTextModel",),
}
_FIXED = {
    "attention_dropout": (0,),
    "dropout": (0,),
    "model_type": ("clip_text_model",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
# Bookkeeping of transformers and generation settings: nothing that the encoder computes with.
IGNORED = frozenset(
    [
        "bos_token_id",
        "pad_token_id",
        "initializer_range",
        "initializer_factor",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "use_cache",
        "gradient_checkpointing",
        "chunk_size_feed_forward",
        "pruned_heads",
        "problem_type",
        "id2label",
        "label2id",
        "finetuning_task",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "sep_token_id",
        "decoder_start_token_id",
        "cross_attention_hidden_size",
        "is_encoder_decoder",
        "tf_legacy_loss",
        "use_bfloat16",
        "torchscript",
        "num_labels",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "attn_implementation",
    ]
)


def text_settings(config: Json) -> Json:
    """Settings with defaults filled in. Raises UserError naming what is not supported."""
    values = read_config(config, _DEFAULTS, _FIXED, IGNORED, "text encoder")
    if values["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"text encoder config: hidden_act = {values['hidden_act']!r} is not supported, "
            f"expected one of {sorted(ACTIVATIONS)}"
        )
    classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    if len(values["architectures"]) != 1 or values["architectures"][0] not in classes:
        raise UserError(
            f"text encoder config: architectures = {list(values['architectures'])!r} is not "
            f"supported, expected one of {list(classes)}"
        )
    heads = values["num_attention_heads"]
    check_divides(
        heads, values["hidden_size"], "num_attention_heads", "hidden_size", "text encoder"
    )
    return values
