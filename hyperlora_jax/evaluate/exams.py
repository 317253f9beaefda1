"""Who is asked what, and who marks it: the part of an evaluation that depends on its pictures.

avatars           exact pictures exist: identity, error and caption parts are measured
a folder or TFDS  real pictures: a judge compares with other pictures of the same subject
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.array_types import Float
from hyperlora_jax.data.concept_sources import list_concepts
from hyperlora_jax.data.size_buckets import square
from hyperlora_jax.data.worlds import World, open_world
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate import compare, judges
from hyperlora_jax.evaluate.attribute_probe import AttributeProbe
from hyperlora_jax.evaluate.compare import MethodResult, Scorer
from hyperlora_jax.evaluate.picture_scores import PictureScorer
from hyperlora_jax.evaluate.picture_sets import AnySet, make_picture_sets
from hyperlora_jax.evaluate.protocol import EvaluationSet, make_evaluation_set
from hyperlora_jax.evaluate.questions import unit_pixels

EMBEDDINGS, RENDERS = "embeddings", "renders"  # folders of a workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Exam:
    """Questions and their marking.

    Attributes:
        validation, test: strengths are chosen on the first, scores are told on the second.
        score: pictures → scores.
        judges: encoders by name, for the table of judges.
        detects: whether a picture shows one subject; None takes all.
        avatars: the world of the exact pictures, None for real ones.
        workdir: where renders and the judges' embeddings are kept.
    """

    validation: AnySet
    test: AnySet
    score: Scorer
    judges: Mapping[str, Any]
    detects: judges.Detects | None
    avatars: World | None
    workdir: Path

    @property
    def real_pictures(self) -> Float[np.ndarray, "i r h w 3"]:
        """What judges compare with: the reference, or where there are others, the others."""
        if isinstance(self.test, EvaluationSet):
            return self.test.references[:, None]
        return unit_pixels(self.test.gallery[: self.test.num_identities])

    def judged(self, results: Mapping[str, MethodResult], encoder: Any) -> dict[str, Any]:
        """Similarities by every judge and by the condition encoder.

        Args:
            encoder: what conditions the hypernetwork.
        """
        if not self.judges:
            return {}
        images = {name: result.images for name, result in results.items()}
        return judges.similarity_numbers(
            images,
            self.real_pictures,
            {"own": encoder, **self.judges},
            condition_hash=encoder.hash,
            detects=self.detects,
            folder=self.workdir / EMBEDDINGS,
        )


def open_exam(config: Any, size: int, trained_on: frozenset[str], workdir: Path) -> Exam:
    """The exam of a config's sections `data` and `evaluate`.

    Args:
        size: pixels of the base model's pictures.
        trained_on: names that training may have known.
        workdir: where renders and the judges' embeddings are kept.

    Raises:
        UserError: too few identities or pictures, one that was trained on, no judge.
    """
    section = config.evaluate
    source = section.source or config.data.source
    found = judges.load_judges(dict(section.judges))
    detects = judges.load_detector(section.detector)
    if source == "avatars":
        return _avatar_exam(config, trained_on, workdir, found, detects)
    if not found:
        raise UserError(
            "evaluate.judges: found none, expected an encoder to compare the pictures of "
            f"{source} by, e.g. --config.evaluate.judges.independent=judge.onnx"
        )
    judge = next(iter(found))
    listed = list_concepts(str(source), square(size), skip_damaged=config.data.skip_damaged)
    subjects = [concept.load() for concept in listed]
    if prompt := config.distill.prompt:
        subjects = [dataclasses.replace(s, captions=(prompt,) * len(s.captions)) for s in subjects]
    validation, test = make_picture_sets(
        subjects,
        str(source),
        prompts=tuple(section.prompts),
        split_seed=config.data.split_seed,
        identity_seed=section.identity_seed,
        num_identities=section.num_identities,
        num_validation=section.num_validation,
        num_captions=section.num_captions,
        num_views=section.num_views,
        num_candidates=section.num_candidates,
        training_ids=trained_on,
    )
    facts = {"judge": judge, "judge_hash": found[judge].hash}
    validation, test = (
        dataclasses.replace(asked, facts={**asked.facts, **facts}) for asked in (validation, test)
    )
    scorer = PictureScorer(found[judge], detects, workdir / EMBEDDINGS)
    return Exam(validation, test, scorer, found, detects, None, workdir)


def _avatar_exam(
    config: Any,
    trained_on: frozenset[str],
    workdir: Path,
    encoders: Mapping[str, Any],
    detects: judges.Detects | None,
) -> Exam:
    section = config.evaluate
    avatars = open_world(config.data.style, config.data.size, config.data.split_seed)
    probe = AttributeProbe.load(section.probe or None)
    counts = {"validation": section.num_validation, "test": section.num_identities}
    sets = [
        make_evaluation_set(
            avatars,
            split=split,
            identity_seed=section.identity_seed,
            num_identities=count,
            num_captions=section.num_captions,
            num_views=section.num_views,
            num_candidates=section.num_candidates,
            training_ids=trained_on,
            cache_dir=workdir / RENDERS,
        )
        for split, count in counts.items()
    ]
    probe.check_parts(sets[1].parts)
    return Exam(*sets, compare.scorer(probe), encoders, detects, avatars, workdir)


def lead(config: Any, test: AnySet) -> str:
    """The sentence under the report's title."""
    if isinstance(test, EvaluationSet):
        kind = f"{config.data.style} identities"
    else:
        kind = f"subjects of {Path(test.facts['source']).name}"
    return (
        f"LoRAs for {test.num_identities} {kind} that were never trained on, written in one pass "
        "from one reference picture each."
    )


def story(config: Any, test: AnySet, num_targets: int) -> list[str]:
    """Paragraphs that say what was done."""
    recipe = config.evaluate.conventional
    fitted = min(recipe.num_identities, test.num_identities)
    captions = "captions that training never saw"
    if not isinstance(test, EvaluationSet):
        captions = "prompts"
    return [
        f"{num_targets} conventional LoRAs of training identities were fitted at once "
        f"({config.distill.num_steps} steps each); their mean and nearest neighbour are controls.",
        f"A hypernetwork was trained for {config.train.num_steps} steps on "
        f"{config.data.num_identities} identities through the frozen base model: every subject of "
        "a batch draws with the LoRA that was just written for it.",
        f"Every method drew {test.num_identities} held-out identities under {test.num_captions} "
        f"{captions}, from the same noise, at the strength that was best for "
        "it on other held-out identities. The conventional LoRA was fitted to "
        f"{test.views.shape[1]} pictures of each of {fitted} of these identities "
        f"for {dict(recipe.recipe).get('num_steps', config.distill.num_steps)} steps.",
    ]
