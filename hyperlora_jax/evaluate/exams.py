"""Who is asked what, and who marks it: the part of an evaluation that depends on its pictures.

avatars           exact pictures exist: identity, error and caption parts are measured
a folder or TFDS  real pictures: a judge compares with other pictures of the same subject
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyperlora_jax.data.concept_sources import list_concepts
from hyperlora_jax.data.concepts import Concept
from hyperlora_jax.data.size_buckets import square
from hyperlora_jax.data.subjects import Subject
from hyperlora_jax.data.worlds import World, open_world
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate import compare, judges, picture_sets
from hyperlora_jax.evaluate.attribute_probe import AttributeProbe
from hyperlora_jax.evaluate.compare import MethodResult, Scorer
from hyperlora_jax.evaluate.exam_sizes import Offer, asked_sizes, fitting_sizes, fitting_splits
from hyperlora_jax.evaluate.judge_choice import Judges, choose_judges
from hyperlora_jax.evaluate.picture_scores import PictureScorer
from hyperlora_jax.evaluate.picture_sets import AnySet, Seen, Sizes, make_picture_sets
from hyperlora_jax.evaluate.protocol import EvaluationSet, make_evaluation_set
from hyperlora_jax.evaluate.questions import unit_pixels
from hyperlora_jax.hypernet.conditioning import ImageEncoder

EMBEDDINGS, RENDERS = "embeddings", "renders"  # folders of a workdir
NAMED = 3  # subjects that a line names


@dataclasses.dataclass(frozen=True, eq=False)
class Exam:
    """Questions and their marking.

    Attributes:
        validation, test: strengths are chosen on the first, scores are told on the second; None
            where there is nobody to choose on.
        score: pictures → scores.
        judges: for the table of judges.
        detects: whether a picture shows one subject; None takes all.
        avatars: the world of the exact pictures, None for real ones.
        workdir: where renders and the judges' embeddings are kept.
        knows_all: whether everybody that the hypernetwork was trained on is in these pictures.
        notes: what a reader must know, a sentence each.
    """

    validation: AnySet | None
    test: AnySet
    score: Scorer
    judges: Judges
    detects: judges.Detects | None
    avatars: World | None
    workdir: Path
    knows_all: bool
    notes: tuple[str, ...] = ()

    @property
    def real_pictures(self) -> judges.RealPictures:
        """What judges compare with: the reference, or where there are others, the others."""
        if isinstance(self.test, EvaluationSet):
            return self.test.references[:, None]
        return [unit_pixels(own) for own in self.test.gallery[: self.test.num_identities]]

    def judged(self, results: Mapping[str, MethodResult]) -> dict[str, Any]:
        """Similarities by every judge."""
        return judges.similarity_numbers(
            {name: result.images for name, result in results.items()},
            self.real_pictures,
            self.judges.encoders,
            leaky=self.judges.leaky,
            detects=self.detects,
            folder=self.workdir / EMBEDDINGS,
        )


def open_exam(
    config: Any,
    size: int,
    trained_on: frozenset[str],
    known: frozenset[str],
    workdir: Path,
    condition: ImageEncoder,
) -> Exam:
    """The exam of a config's sections `data` and `evaluate`.

    Args:
        size: pixels of the base model's pictures.
        trained_on: names that the hypernetwork was trained on; known: those and all others that a
            method may have seen.
        workdir: where renders and the judges' embeddings are kept.
        condition: the encoder that conditions the hypernetwork.

    Raises:
        UserError: too few identities or pictures, or one that was trained on.
    """
    section = config.evaluate
    source = section.source or config.data.source
    given = frozenset(config.get("given", ()))
    asked = asked_sizes(section)
    detects = judges.load_detector(section.detector)
    chosen = choose_judges(section, condition, size, real=source != "avatars")
    if source == "avatars":
        return _avatar_exam(config, asked, given, trained_on, known, workdir, chosen, detects)
    listed = list_concepts(str(source), square(size), skip_damaged=config.data.skip_damaged)
    people, strangers, sizes, notes = _subjects(config, listed, asked, given, known, str(source))
    validation, test = make_picture_sets(
        people,
        str(source),
        sizes,
        prompts=tuple(section.prompts),
        split_seed=config.data.split_seed,
        identity_seed=section.identity_seed,
        training_ids=known,
        strangers=strangers,
        seen=_seen(listed, condition),
    )
    facts = {
        "judge": chosen.main,
        "judge_hash": chosen.encoders[chosen.main].hash,
        "judge_is_condition_encoder": chosen.main in chosen.leaky,
    }
    validation, test = (
        asked and dataclasses.replace(asked, facts={**asked.facts, **facts})
        for asked in (validation, test)
    )
    assert test is not None
    scorer = PictureScorer(chosen.encoders[chosen.main], detects, workdir / EMBEDDINGS)
    told = tuple(note for note in (*notes, chosen.note) if note)
    knows_all = bool(trained_on) and trained_on <= {concept.id for concept in listed}
    return Exam(validation, test, scorer, chosen, detects, None, workdir, knows_all, told)


def _subjects(
    config: Any,
    listed: Sequence[Concept],
    asked: Sizes,
    given: frozenset[str],
    known: frozenset[str],
    source: str,
) -> tuple[list[Subject], list[Subject], Sizes, list[str]]:
    """(held-out subjects, validation first; others to tell apart, the sizes to use, notes)."""
    free = picture_sets.held_out(listed, known)
    if not free:
        raise UserError(
            f"{source}: none of its {len(listed)} subjects is held out, all were trained on or are "
            "in the LoRA dataset; train with a smaller --config.data.num_identities, or name other "
            "pictures by --config.evaluate.source"
        )
    needed = asked.num_validation + asked.num_identities
    people, alone = [], []
    for concept in picture_sets.in_order(free, config.data.split_seed):
        if len(people) == needed:
            break
        subject = _with_prompt(concept.load(), config.distill.prompt)
        judged_by = picture_sets.parted(subject, 1)[1]
        (people if judged_by else alone).append(subject)
    if not people:
        raise UserError(
            f"{source}: none of its {len(free)} held-out subjects can be judged, as each has one "
            "picture; expected one to show and another to judge by"
        )
    chosen = {person.id for person in people}
    rest = [concept for concept in listed if concept.id not in chosen]
    wanted = max(0, asked.num_candidates - len(people))
    strangers = [concept.load() for concept in _others(rest, people)[:wanted]]
    offer = Offer(
        source,
        len(people),
        len(people) + len(strangers),
        [len(picture_sets.parted(person, len(person.references))[0]) for person in people],
        [len({*person.references, *person.targets}) for person in people],
    )
    sizes, line = fitting_sizes(asked, given, offer)
    used = people[: sizes.num_validation + sizes.num_identities]
    strangers = [*people[len(used) :], *strangers]
    return used, strangers, sizes, [line, _alone_note(alone), _nobody_note(sizes)]


def _others(rest: Sequence[Concept], people: Sequence[Subject]) -> list[Concept]:
    """One concept of every identity that is not among the people."""
    taken = {person.identity for person in people}
    found: dict[str, Concept] = {}
    for concept in rest:
        if concept.identity not in taken:
            found.setdefault(concept.identity, concept)
    return list(found.values())


def _alone_note(alone: Sequence[Subject]) -> str:
    if not alone:
        return ""
    names = ", ".join(person.id for person in alone[:NAMED])
    more = f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
    return f"left out, as a subject with one picture has none to judge by: {names}{more}"


def _nobody_note(sizes: Sizes) -> str:
    if sizes.num_validation:
        return ""
    return (
        "nobody is left to choose strengths on (evaluate.num_validation is 0): every method draws "
        "at strength 1"
    )


def _with_prompt(subject: Subject, prompt: str) -> Subject:
    if not prompt:
        return subject
    return dataclasses.replace(subject, captions=(prompt,) * len(subject.captions))


def _seen(listed: Sequence[Concept], condition: ImageEncoder) -> Seen:
    """What the condition encoder is shown of a subject: its first reference at the encoder's size,
    as training and `hyperlora generate` read it."""
    by_id = {concept.id: concept for concept in listed}
    return lambda name: np.asarray(by_id[name].references_at(condition.image_size)[0])


def _avatar_exam(
    config: Any,
    asked: Sizes,
    given: frozenset[str],
    trained_on: frozenset[str],
    known: frozenset[str],
    workdir: Path,
    chosen: Judges,
    detects: judges.Detects | None,
) -> Exam:
    section = config.evaluate
    avatars = open_world(config.data.style, config.data.size, config.data.split_seed)
    probe = AttributeProbe.load(section.probe or None)
    there = [avatars.num_identities(split) for split in ("validation", "test")]
    sizes, line = fitting_splits(asked, given, avatars.style, *there)
    counts = {"validation": sizes.num_validation, "test": sizes.num_identities}
    validation, test = (
        make_evaluation_set(
            avatars,
            split=split,
            identity_seed=section.identity_seed,
            num_identities=count,
            num_captions=sizes.num_captions,
            num_views=sizes.num_views,
            num_candidates=sizes.num_candidates,
            training_ids=known,
            cache_dir=workdir / RENDERS,
        )
        if count
        else None
        for split, count in counts.items()
    )
    assert test is not None
    probe.check_parts(test.parts)
    score = compare.scorer(probe)
    notes = tuple(note for note in (line, _nobody_note(sizes), chosen.note) if note)
    return Exam(
        validation, test, score, chosen, detects, avatars, workdir,
        _knows_all(avatars, trained_on), notes,
    )  # fmt: skip


def _knows_all(avatars: World, trained_on: frozenset[str]) -> bool:
    """Whether those that were trained on are the first training identities of this world."""
    names = {avatars.identity("train", k).id for k in range(len(trained_on))}
    return bool(trained_on) and trained_on <= names
