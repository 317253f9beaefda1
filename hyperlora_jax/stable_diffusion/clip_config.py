"""What a text encoder's config.json of transformers says; strict, as `configs` describes."""

from collections.abc import Mapping
from typing import Any

import jax

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.configs import check_divides, read_config

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
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
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


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with defaults filled in. Raises UserError naming what is not supported."""
    values = read_config(config, _DEFAULTS, _FIXED, IGNORED, "text encoder")
    if values["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"text encoder config: hidden_act = {values['hidden_act']!r} is not supported, "
            f"expected one of {sorted(ACTIVATIONS)}"
        )
    known = ("CLIPTextModel", "CLIPTextModelWithProjection")
    if len(values["architectures"]) != 1 or values["architectures"][0] not in known:
        raise UserError(
            f"text encoder config: architectures = {list(values['architectures'])!r} is not "
            f"supported, expected one of {list(known)}"
        )
    heads = values["num_attention_heads"]
    check_divides(
        heads, values["hidden_size"], "num_attention_heads", "hidden_size", "text encoder"
    )
    return values
