"""Does the hypernetwork know what it does not know? Its familiarity with held-out subjects against
pictures from elsewhere, and against its own errors.

AUC is the probability that a held-out subject is more familiar than a stranger (ties count half):
1 = every stranger is noticed, 0.5 = none.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from hyperlora_jax.array_types import Float, JsonDict
from hyperlora_jax.evaluate.report import charts
from hyperlora_jax.evaluate.report.html_page import Figure
from hyperlora_jax.evaluate.report.sections import Section
from hyperlora_jax.worlds.avatar_styles import STYLES
from hyperlora_jax.worlds.avatars import Avatars
from hyperlora_jax.worlds.by_style import World

Pictures = Float[np.ndarray, "i h w 3"]


def strangers(references: Pictures, world: World | None = None) -> dict[str, Pictures]:
    """As many pictures of every kind that no model of such subjects can do justice to.

    Args:
        references: pictures in [0, 1] that it should know, for their size and their colours.
        world: where they are drawn; people of its other styles are strangers too.
    """
    random = np.random.default_rng(0)
    count, size = references.shape[:2]
    pixels = references.reshape(count, -1, 3)
    drawn_people = {
        "noise": random.uniform(size=references.shape).astype(np.float32),
        "its pixels in random order": np.stack(
            [random.permutation(picture) for picture in pixels]
        ).reshape(references.shape),
        "upside down": references[:, ::-1],
        "negative": 1.0 - references,
    }
    if isinstance(world, Avatars):
        for style in [style for style in STYLES if style != world.style][:2]:
            other = Avatars(style, size, world.split_seed)
            pairs = [(other.identity("test", k), other.view("test", k)) for k in range(count)]
            drawn = other.render_many(pairs, progress=False)
            drawn_people[f"people of {style}"] = np.asarray(drawn, np.float32) / 255.0
    return drawn_people


def confidence_section(
    familiarity_of: Callable[[Pictures], Float[np.ndarray, " i"]],
    references: Pictures,
    others: Mapping[str, Pictures],
    losses: Float[np.ndarray, " i"],
) -> Section:
    """How well familiarity tells subjects of the domain from strangers, and good LoRAs from bad.

    Args:
        familiarity_of: of a hypernetwork.
        references: of the held-out subjects; others: of strangers, by kind.
        losses: of the pictures drawn for every held-out subject.
    """
    held_out = familiarity_of(references)
    familiarities = {kind: familiarity_of(pictures) for kind, pictures in others.items()}
    differ = len({*held_out}) > 1 and len({*losses}) > 1
    rank: Any = stats.spearmanr(held_out, losses) if differ and len(held_out) > 2 else None
    numbers: JsonDict = {
        "held_out": {"familiarity": float(held_out.mean()), "n": len(held_out)},
        "strangers": {
            kind: {"familiarity": float(scores.mean()), "auc": auc(held_out, scores)}
            for kind, scores in familiarities.items()
        },
    }
    if rank is not None:
        numbers["rank_correlation_with_error"] = {
            "rho": float(rank.statistic), "p": float(rank.pvalue), "n": len(held_out),
        }  # fmt: skip
    bars = {"held-out subjects": float(held_out.mean())}
    bars |= {kind: float(scores.mean()) for kind, scores in familiarities.items()}
    worst = min(numbers["strangers"].values(), key=lambda kind: kind["auc"])["auc"]
    note = (
        "Mean familiarity, the share of training subjects that are less like their own nearest "
        f"neighbour. A held-out subject is told from a stranger of any kind with AUC {worst:.2f} "
        "or more."
    )
    if rank is not None:
        note += (
            f" Rank correlation with the error of the pictures: {rank.statistic:.2f} "
            f"(p = {rank.pvalue:.2f}; below 0 = less familiar subjects are drawn worse)."
        )
    figure = Figure("confidence", charts.bar_chart(bars, "familiarity"), note, "What it knows")
    return Section("confidence", numbers, (figure,))


def auc(higher: Float[np.ndarray, " n"], lower: Float[np.ndarray, " m"]) -> float:
    """Probability that a value of `higher` exceeds one of `lower`; ties count half."""
    statistic = stats.mannwhitneyu(higher, lower)[0]
    return float(statistic / (len(higher) * len(lower)))
