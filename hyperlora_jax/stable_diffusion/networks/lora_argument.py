"""LoRAs as an argument of a model, in all the forms that people have them, as one tree; checked
against the model's shapes before tracing.

Linen ignores leaves that no layer asks for, so a misspelt site would silently do nothing.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec, torch_path
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.stable_diffusion.networks.blocks import kernel_shape


def lora_tree(given: Any, base: Any) -> Params | None:
    """A tree from a tree, a file, what `load_lora` returns, or a list of those (of other ranks and
    sites too), which gets a leading axis; None from None or an empty list.

    Args:
        base: the model that files are checked against.

    Raises:
        UserError: anything else; see also `load_lora`.
    """
    if given is None or isinstance(given, Mapping):
        return given or None
    if isinstance(given, str | os.PathLike):
        return load_lora(given, base)[0]
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], LoraSpec):
        return given[0]
    if not isinstance(given, list | tuple):
        raise UserError(
            f"lora: found {type(given).__name__}, expected a LoRA tree, a file, or a list of those"
        )
    singles = []
    for one in given:
        tree = lora_tree(one, base)
        if tree is None or isinstance(one, list):
            raise UserError("lora: expected a LoRA tree or a file for every entry of the list")
        count = factors.num_loras(tree)
        singles += [tree] if count is None else [factors.index(tree, k) for k in range(count)]
    return factors.stack_padded(singles) if singles else None


def count_loras(lora: Params | None) -> int:
    """How many LoRAs a tree holds, at least 1: a single one and none count as one."""
    return (factors.num_loras(lora) if lora else None) or 1


def scaled(lora: Params, strength: float | Sequence[float] | AnyArray) -> Params:
    """A LoRA times its strength: a number, or one for each of a batch; UserError for others."""
    numbers = jnp.asarray(strength, jnp.float32)
    if numbers.shape not in ((), (count_loras(lora),)):
        raise UserError(
            f"strength: found numbers of shape {list(numbers.shape)} for {count_loras(lora)} "
            "LoRAs, expected one, or one for each"
        )
    single = factors.num_loras(lora) is None
    return factors.scale(lora, numbers.reshape(()) if single else numbers)


def for_branches(lora: Params, negative: bool) -> Params:
    """L LoRAs for the rows of the negative branch of guidance, and then the same for those of the
    positive one; zeros in the place of the first unless they act on the `negative` branch."""
    if factors.num_loras(lora) is None:
        lora = factors.repeat(lora, 1)
    return jax.tree.map(
        lambda leaf: jnp.concatenate([leaf if negative else jnp.zeros_like(leaf), leaf]), lora
    )


def check_lora(lora: Params, params: Params, batch: int, prefix: str = "") -> None:
    """Checks every site of a LoRA tree against the kernels in `params`.

    `prefix` ("text_encoder.") is put before the site names in messages.

    Raises:
        UserError: naming a site that the model does not have, a factor that is missing or of the
            wrong shape, or numbers of LoRAs that differ or do not divide `batch`.
    """
    counts: dict[tuple[int, ...], str] = {}
    for path, pair in _sites(lora, ()):
        name = prefix + torch_path(path)
        kernel = kernel_shape(params, path)
        if kernel is None:
            raise UserError(f"LoRA site {name}: the model has no such layer")
        counts.setdefault(_check_pair(name, pair, kernel), name)
    if len(counts) > 1:
        (first, a), (second, b) = list(counts.items())[:2]
        raise UserError(f"LoRA site {b}: leading axis {second}, but {first} at site {a}")
    for lead, name in counts.items():
        if lead and batch % lead[0]:
            raise UserError(
                f"LoRA site {name}: {lead[0]} LoRAs cannot serve a batch of {batch}, expected a "
                "number that divides it"
            )


def _sites(tree: Params, path: tuple[str, ...]):
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            raise UserError(
                f"LoRA site {torch_path(path)}: unexpected factor {name!r}, expected down and up"
            )
        if "down" in value or "up" in value:
            yield (*path, name), value
        else:
            yield from _sites(value, (*path, name))


def _check_pair(name: str, pair: Params, kernel: tuple[int, ...]) -> tuple[int, ...]:
    if set(pair) != {"down", "up"}:
        raise UserError(f"LoRA site {name}: factors {sorted(pair)}, expected down and up")
    down, up = tuple(pair["down"].shape), tuple(pair["up"].shape)
    single = len(kernel)
    lead = down[: len(down) - single]
    fits = len(lead) <= 1 and len(down) >= single and down[len(lead) : -1] == kernel[:-1]
    if not fits or up != (*lead, down[-1], kernel[-1]):
        raise UserError(
            f"LoRA site {name}: down {down} and up {up} do not fit a kernel of shape {kernel}"
        )
    return lead
