"""FLOPs of a function from its jaxpr: matrix products and convolutions, loops times their length.

XLA's own count takes the body of a loop once and a Pallas kernel for nothing; this one does not,
and it knows nothing of hardware.
Everything else (norms, softmax, optimiser) is left out: it is bandwidth, not FLOPs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr


def flops(function: Callable[..., object], *arguments: object) -> float:
    """FLOPs of one call (a multiply-add counts 2) on arrays or ShapeDtypeStructs."""
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_training(loss: Callable[..., object]) -> Callable[..., float]:
    """Model FLOPs of a training step on the arguments of `loss`: its forward pass three times."""
    return lambda *arguments: 3.0 * flops(loss, *arguments)


def of_jaxpr(jaxpr: Jaxpr) -> float:
    """FLOPs of a jaxpr, with everything that it calls; a `cond` counts its dearest branch."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += params["length"] * of_jaxpr(params["jaxpr"].jaxpr)
        elif name == "pallas_call":
            total += math.prod(params["grid_mapping"].grid) * of_jaxpr(params["jaxpr"])
        elif name == "shard_map":  # the jaxpr of one device
            total += params["mesh"].size * of_jaxpr(params["jaxpr"])
        elif name == "cond":
            total += max(of_jaxpr(branch.jaxpr) for branch in params["branches"])
        else:
            for value in params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        total += of_jaxpr(inner)
    return total


def _dot(equation: Any) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contract)


def _convolution(equation: Any) -> float:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    window = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
    return 2.0 * equation.outvars[0].aval.size * window / equation.params["batch_group_count"]
