"""A LoRA tree as an argument of a model: checked against the model's shapes before tracing.

Linen ignores leaves that no layer asks for, so a misspelt site would silently do nothing.
"""

from collections.abc import Mapping

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import torch_path
from hyperlora_jax.stable_diffusion.equal_blocks import kernel_shape


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
