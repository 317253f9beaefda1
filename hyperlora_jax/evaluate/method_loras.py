"""Where the LoRAs of every method come from: a table of names, one function each.

base                no LoRA (a LoRA of zeros: the same compiled program as all others)
mean_lora, nearest, knn, ridge, pca_gaussian
                    closed forms, fitted on the LoRA-target dataset (`hypernet/baselines.py`)
noisy_copy          the nearest training LoRA, and noise of half the median leave-one-out distance
generated           the hypernetwork, given the reference
generated_N         the same, given the identity's first N views
shuffled            the hypernetwork, given another identity's reference
refined_N           the generated LoRA after N steps on the identity's views (`refine.py`)
linear_combination  coefficients of training LoRAs, fitted by gradient to the reference (2412.02352)
conventional        a LoRA fitted to all views of the identity
conventional_N      a LoRA fitted to the first N views; conventional_1 to the reference alone

Other trained generators join by `evaluate.others.NAME = WORKDIR`.

`runnable_methods` says which of those asked for can run, and why the others cannot.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import Float, Json, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.fitted_sets import FittedSets
from hyperlora_jax.evaluate.methods import NUMBERED, LorasOf, number_of
from hyperlora_jax.evaluate.protocol import Questions
from hyperlora_jax.evaluate.training_loras import TrainingLoras
from hyperlora_jax.hypernet.baselines import make_baseline
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSpec

BASELINE_NAMES = {
    "mean_lora": "mean",
    "nearest": "nearest",
    "knn": "knn",
    "ridge": "ridge",
    "pca_gaussian": "pca_gaussian",
}
GUIDED = ("knn", "ridge")  # averages shrink to the mean
# What methods need beside the hypernetwork: training LoRAs, and of some the reference pictures.
NEED_PICTURES = ("nearest", "knn", "ridge", "noisy_copy")
NEED_LORAS = ("mean_lora", "pca_gaussian", "linear_combination", *NEED_PICTURES)
COPY_NOISE = 0.5


@dataclasses.dataclass(frozen=True)
class Source:
    """LoRAs of one method.

    Attributes:
        loras_of: (evaluation set, guidance) → LoRA tree of its first identities.
        depends_on: what its pictures depend on, for the cache.
        steps: optimiser steps per new identity.
        tuned: whether strength is chosen.
        guided: whether guidance is chosen.
        hyper: the generator behind it, where one pass makes the LoRA of so many views.
    """

    loras_of: LorasOf
    depends_on: object
    steps: int = 0
    tuned: bool = True
    guided: bool = False
    hyper: Hypernetwork | None = None
    num_views: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What sources are made of.

    Attributes:
        vectors: training LoRAs [t, d] in the config's gauge; embeddings [t, e] of their references;
            None where there are none, or no method needs them (`runnable_methods`).
        fitted: fits to the evaluated identities, None where no method needs them.
        others: more hypernetworks by name.
        baseline: keyword arguments of `make_baseline`.
    """

    spec: LoraSpec
    hyper: Hypernetwork
    vectors: Float[np.ndarray, "t d"] | None
    embeddings: Float[np.ndarray, "t e"] | None
    fitted: FittedSets | None
    others: Mapping[str, Hypernetwork]
    baseline: Json

    def weights(self) -> object:
        """What the hypernetwork's LoRAs depend on."""
        return [self.hyper.params, self.hyper.constants, self.hyper.model]


def make_source(name: str, context: Context) -> Source:
    """The source of a method's name.

    Raises:
        ValueError: an unknown name.
    """
    if name in context.others:
        return _hypernetwork(context.others[name])
    if name in BASELINE_NAMES:
        return _baseline(name, context)
    if name in MAKERS:
        return MAKERS[name](context)
    if (number := number_of(name)) is not None:
        return NUMBERED_MAKERS[name.rpartition("_")[0]](context, number)
    raise ValueError(_unknown(name, context.others))


def is_method(name: object, others: Collection[str] = ()) -> bool:
    """Whether a method of this name can be compared, or one of `others`, of more generators."""
    own = (*MAKERS, *BASELINE_NAMES, *WITHOUT_MODEL, *others)
    return name in own or number_of(str(name)) is not None


def method_names(others: Collection[str] = ()) -> str:
    """All names that `is_method` is true of, for people."""
    own = (*MAKERS, *BASELINE_NAMES, *WITHOUT_MODEL, *others)
    return ", ".join([*own, *(f"{kind}_N" for kind in NUMBERED)])


def _unknown(name: str, others: Collection[str]) -> str:
    return f"method {name!r} is unknown, expected one of {method_names(others)}"


def one_per_identity(
    hyper: Hypernetwork, references: np.ndarray | Sequence[Sequence[np.ndarray]], guidance: float
) -> Params:
    """A generator's LoRAs of some references, one or several each; guidance multiplies
    its own default's distance from plain only where it is given."""
    given = {} if guidance == 1.0 else {"guidance": guidance}
    return jax.device_get(hyper.generate(jax.random.key(0), references, strength=1.0, **given))


def _hypernetwork(hyper: Hypernetwork, num_views: int = 1) -> Source:
    def loras_of(questions: Questions, guidance: float) -> Params:
        shown: np.ndarray | list[list[np.ndarray]] = questions.seen_references
        if num_views > 1:
            shown = [[*own] for own in questions.first_views(num_views)]
        return one_per_identity(hyper, shown, guidance)

    several = [num_views] if num_views > 1 else []
    return Source(
        loras_of,
        [hyper.params, hyper.constants, hyper.model, hyper.facts.get("generate"), *several],
        guided=bool(hyper.model.get("condition_dropout")),
        hyper=hyper,
        num_views=num_views,
    )


def _generated(context: Context) -> Source:
    return _hypernetwork(context.hyper)


def _shuffled(context: Context) -> Source:
    def loras_of(questions: Questions, guidance: float) -> Params:
        others = np.roll(questions.seen_references, 1, 0)
        return one_per_identity(context.hyper, others, guidance)

    return Source(loras_of, context.weights())


def _base(context: Context) -> Source:
    zero = jax.device_get(factors.zeros(context.spec))
    return Source(lambda q, _: factors.repeat(zero, q.num_identities), "zeros", tuned=False)


def fitted_baseline(name: str, context: Context) -> Hypernetwork:
    """A closed-form generator, fitted on the training LoRAs."""
    kind, vectors = BASELINE_NAMES[name], _vectors(context)
    settings = dict(context.baseline)
    if kind == "knn":  # small datasets have fewer
        settings["num_neighbours"] = min(settings["num_neighbours"], len(vectors))
    generator = make_baseline(kind, context.spec, **settings)
    constants = generator.fit(_embeddings(name, context), vectors)
    model = {"generator": kind, "baseline": settings}
    return Hypernetwork(generator, {}, context.hyper.encoder, {}, model, constants)


def _baseline(name: str, context: Context) -> Source:
    hyper = fitted_baseline(name, context)
    source = _hypernetwork(hyper)
    depends_on = [name, context.vectors, _embeddings(name, context), hyper.model]
    return dataclasses.replace(source, depends_on=depends_on, guided=name in GUIDED)


def _noisy_copy(context: Context) -> Source:
    nearest, trained = fitted_baseline("nearest", context), _vectors(context)

    def loras_of(questions: Questions, guidance: float) -> Params:
        copies = one_per_identity(nearest, questions.seen_references, guidance)
        vectors = np.asarray(vectorize.flatten(jax.tree.map(jnp.asarray, copies), context.spec))
        noise = np.random.default_rng(0).standard_normal(vectors.shape).astype(np.float32)
        spread = trained.std(axis=0)
        noise *= spread / max(float(np.linalg.norm(spread)), 1e-12)
        length = COPY_NOISE * median_nearest_distance(trained)
        return vectorize.unflatten(jnp.asarray(vectors + length * noise), context.spec)

    return Source(loras_of, ["noisy_copy", trained, context.embeddings])


def median_nearest_distance(vectors: Float[np.ndarray, "t d"]) -> float:
    """Median over LoRAs of the distance to the nearest other one, on raw factors."""
    gram = (vectors @ vectors.T).astype(np.float64)
    squares = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    np.fill_diagonal(squares, np.inf)
    return float(np.sqrt(np.maximum(np.median(squares.min(axis=1)), 0.0)))


def _conventional(context: Context, num_views: int | None = None) -> Source:
    loras = _fits(context).conventional(num_views)
    return Source(
        lambda q, _: loras[q.split],
        ["conventional", num_views, loras],
        steps=_fits(context).recipe.num_steps,
    )


def _fits(context: Context) -> FittedSets:
    if context.fitted is None:
        raise ValueError("this comparison has no fits")
    return context.fitted


def _vectors(context: Context) -> Float[np.ndarray, "t d"]:
    if context.vectors is None:
        raise ValueError("this comparison has no training LoRAs")
    return context.vectors


def _embeddings(name: str, context: Context) -> Float[np.ndarray, "t e"]:
    if context.embeddings is not None:
        return context.embeddings
    if name in NEED_PICTURES:
        raise ValueError("this comparison has no references of training LoRAs")
    return np.zeros((len(_vectors(context)), 0), np.float32)  # never looked at


def _linear_combination(context: Context) -> Source:
    loras, steps = _fits(context).linear_combination(_vectors(context))
    return Source(lambda q, _: loras[q.split], ["linear_combination", loras], steps=steps)


def _refined(context: Context, num_steps: int) -> Source:
    def start(questions: Questions) -> Params:
        plain = one_per_identity(context.hyper, questions.seen_references, 1.0)
        return jax.device_get(factors.scale(plain, context.hyper.default_strength))

    @functools.cache
    def loras() -> dict[str, Params]:
        strength = context.hyper.default_strength
        return _fits(context).refined(num_steps, start, [context.weights(), strength])

    depends_on = ["refined", num_steps, context.weights(), context.hyper.default_strength]
    return Source(lambda q, _: loras()[q.split], depends_on, steps=num_steps)


MAKERS: dict[str, Callable[[Context], Source]] = {
    "base": _base,
    "generated": _generated,
    "shuffled": _shuffled,
    "noisy_copy": _noisy_copy,
    "linear_combination": _linear_combination,
    "conventional": _conventional,
}
NUMBERED_MAKERS: dict[str, Callable[[Context, int], Source]] = {
    "generated": lambda context, num_views: _hypernetwork(context.hyper, num_views),
    "refined": _refined,
    "conventional": _conventional,
}


KEY = "evaluate.methods"
WITHOUT_MODEL = ("exact", "copy_reference")  # every comparison has them


def runnable_methods(
    asked: Sequence[str],
    others: Collection[str],
    loras: TrainingLoras,
    num_identities: int,
    num_views: int,
    *,
    given: bool,
) -> tuple[list[str], list[str]]:
    """(names to run, a line for every reason to leave others out).

    Args:
        asked: names, of a config; those of `WITHOUT_MODEL` are passed over.
        others: more generators by name.
        loras: the LoRAs that some methods need.
        num_identities: of the test set; num_views: that the one with the most shows.
        given: whether somebody asked for these very methods; what cannot run then is an error.

    Raises:
        UserError: an unknown method, or one that was asked for and cannot run.
    """
    names = [name for name in dict.fromkeys([*asked, *others]) if name not in WITHOUT_MODEL]
    left_out: dict[str, list[str]] = {}
    for name in names:
        if not is_method(name, others):
            raise UserError(f"--config.{KEY}: {_unknown(name, others)}")
        why = _why_not(name, loras, num_identities, num_views)
        if why and given:
            raise UserError(f"--config.{KEY}: {name} cannot run ({why})")
        if why:
            left_out.setdefault(why, []).append(name)
    lines = [f"left out {', '.join(own)} ({why})" for why, own in left_out.items()]
    without = {name for own in left_out.values() for name in own}
    return [name for name in names if name not in without], lines


def _why_not(name: str, loras: TrainingLoras, num_identities: int, num_views: int) -> str:
    number = number_of(name) or 0
    if number > num_views and not name.startswith("refined"):
        return f"at most {num_views} of a subject's pictures are shown, evaluate.num_views"
    if name in NEED_LORAS and loras.no_loras:
        return loras.no_loras
    if name in NEED_PICTURES and loras.no_pictures:
        return loras.no_pictures
    if name == "noisy_copy" and len(loras) < 2:
        return f"it needs 2 training LoRAs, there is {len(loras)}"
    if name == "shuffled" and num_identities < 2:
        return "it needs 2 subjects to exchange their references, there is 1"
    return ""
