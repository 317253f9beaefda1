"""Generators: condition → LoRA, behind one Protocol. Those that answer in one pass are here.

    Regression   lora = network(condition)
    Iterative    the network sees its last answer and corrects it, k times (2307.06949)

Diffusion and the paper's VAE are in `weight_diffusion.py`, what is fitted in closed form in
`baselines.py`; `building.py` makes them from a config.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Array, ArrayTree, Float, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.condition import Condition, both, dropped
from hyperlora_jax.hypernet.token_network import TokenHypernetwork
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec

SLICE = 16  # conditions of one pass on a CPU


class Estimate(NamedTuple):
    """What training sees: LoRAs with leading axis l (any loss may be put on them), and losses of
    the generator's own, {name: [l]}."""

    lora: Params
    losses: dict[str, Float[Array, " l"]]


class Draw(NamedTuple):
    """How to sample: away from "unknown" by `guidance` (1 = plain), in `num_steps` by `sampler`."""

    guidance: float = 1.0
    num_steps: int = 25
    sampler: str = "ddim"


@runtime_checkable
class Generator(Protocol):
    """Condition → LoRA. Frozen and hashable: a static argument of compiled functions.

    `constants` are arrays that are kept with the checkpoint and never trained, e.g. the mean and
    spread of the LoRA-target dataset; {} for generators that need none.
    """

    @property
    def spec(self) -> LoraSpec:
        """The sites that it writes."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether different keys give different LoRAs."""
        ...

    @property
    def needs_targets(self) -> bool:
        """Whether `train` needs target LoRAs."""
        ...

    def init(self, key: Array, condition: Condition) -> Params:
        """Trainable parameters, from shapes of a condition."""
        ...

    def train(
        self,
        params: Params,
        constants: Params,
        condition: Condition,
        target: Float[Array, "l d"] | None,
        key: Array,
    ) -> Estimate:
        """One training pass; `target` holds flat LoRA vectors where the generator wants them."""
        ...

    def sample(
        self, params: Params, constants: Params, condition: Condition, key: Array, draw: Draw
    ) -> Params:
        """LoRA tree with leading axis l."""
        ...


@dataclasses.dataclass(frozen=True)
class Direct(abc.ABC):
    """What answers with a LoRA at once, without noise and without looking at targets.

    Attributes:
        net: the network.
        condition_dropout: share of subjects that training makes unknown; guidance needs it.
    """

    net: TokenHypernetwork
    condition_dropout: float = 0.0

    stochastic = False
    needs_targets = False

    @property
    def spec(self) -> LoraSpec:
        """See `Generator`."""
        return self.net.layout.spec

    @abc.abstractmethod
    def answer(self, params: Params, condition: Condition) -> Params:
        """LoRA tree with leading axis l."""

    def train(
        self,
        params: Params,
        constants: Params,
        condition: Condition,
        target: Array | None,
        key: Array,
    ) -> Estimate:
        """See `Generator`; the target is not looked at."""
        del constants, target
        condition = dropped(condition, self.condition_dropout, key)
        return Estimate(self.answer(params, condition), {})

    def sample(
        self, params: Params, constants: Params, condition: Condition, key: Array, draw: Draw
    ) -> Params:
        """See `Generator`; guidance moves away from the LoRA of an unknown subject."""
        del constants, key
        run = in_slices(lambda c: self.answer(params, c))
        return guided(run, condition, draw.guidance, self.condition_dropout)


class Regression(Direct):
    """The network's answer is the LoRA."""

    def init(self, key: Array, condition: Condition) -> Params:
        """See `Generator`."""
        return self.net.init(key, condition)["params"]

    def answer(self, params: Params, condition: Condition) -> Params:
        """See `Direct`."""
        return cast(Params, self.net.apply({"params": params}, condition))


@dataclasses.dataclass(frozen=True)
class Iterative(Direct):
    """k passes of one network, each of which sees the answer of the one before.

    Attributes:
        net: a network with `input_noise`, which is where the last answer goes in.
        num_iterations: k. Training looks at the last answer.
    """

    num_iterations: int = 4

    def __post_init__(self):
        if self.num_iterations < 1 or not self.net.input_noise:
            raise ValueError(
                "iterative regression needs num_iterations >= 1 and a network with input_noise. "
                f"Got: {self.num_iterations=} and {self.net.input_noise=}"
            )

    def init(self, key: Array, condition: Condition) -> Params:
        """See `Generator`."""
        zero = factors.zeros(self.spec, len(condition.pooled))
        return self.net.init(key, condition, zero, jnp.zeros(len(condition.pooled)))["params"]

    def answer(self, params: Params, condition: Condition) -> Params:
        """See `Direct`."""
        count = len(condition.pooled)
        lora = factors.zeros(self.spec, count)
        for k in range(self.num_iterations):
            time = jnp.full((count,), k / self.num_iterations)
            lora = cast(Params, self.net.apply({"params": params}, condition, lora, time))
        return lora


def in_slices(function: Callable[[Condition], Params]) -> Callable[[Condition], Params]:
    """The function, on a CPU of at most `SLICE` conditions at a time, the last of them repeated to
    fill up: what it works on stays in the cache, and its memory, which the system hands out page
    by page at every call, small."""

    def run(condition: Condition) -> Params:
        count = len(condition.pooled)
        if count <= SLICE or jax.default_backend() != "cpu":
            return function(condition)
        parts = -(-count // SLICE)
        size = -(-count // parts)
        rows = np.minimum(np.arange(parts * size), count - 1).reshape(parts, size)
        leaves, kind = jax.tree.flatten(condition)
        written = jax.lax.map(lambda own: function(kind.unflatten(own)), [x[rows] for x in leaves])
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], written)

    return run


def guided(
    function: Callable[[Condition], ArrayTree],
    condition: Condition,
    guidance: float,
    condition_dropout: float,
) -> ArrayTree:
    """unknown + guidance · (known - unknown) of a function of conditions (classifier-free
    guidance, arXiv 2207.12598); one pass when guidance is 1.

    Raises:
        UserError: guidance for a generator that was trained without condition dropout.
    """
    if guidance == 1.0:
        return function(condition)
    if condition_dropout == 0.0:
        raise UserError(
            f"guidance is {guidance}, but the generator was trained with condition_dropout = 0: "
            "it does not know what an unknown subject is; expected guidance 1"
        )
    count = len(condition.pooled)
    values = function(both(condition))
    return jax.tree.map(lambda v: v[count:] + guidance * (v[:count] - v[count:]), values)
