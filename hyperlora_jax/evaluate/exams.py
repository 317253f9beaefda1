"""Who is asked what, and who marks it: the part of an evaluation that depends on its pictures.

avatars           exact pictures exist: identity, error and caption parts are measured
a folder or TFDS  real pictures: a judge compares with other pictures of the same subject

Sizes are made to fit what there is of subjects, candidates and views: what somebody gave on the
command line is kept, and refused where the source does not offer it; a config's defaults are cut to
what it offers, and that is said.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from hyperlora_jax.array_types import Json
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate import compare, picture_sets
from hyperlora_jax.evaluate.compare import MethodResult, Scorer
from hyperlora_jax.evaluate.judges import judges
from hyperlora_jax.evaluate.judges.attribute_probe import AttributeProbe
from hyperlora_jax.evaluate.judges.judges import Judges, choose_judges
from hyperlora_jax.evaluate.judges.picture_scores import PictureScorer
from hyperlora_jax.evaluate.picture_sets import AnySet, Seen, Sizes, make_picture_sets
from hyperlora_jax.evaluate.protocol import EvaluationSet, make_evaluation_set, unit_pixels
from hyperlora_jax.pictures.concepts import Concept
from hyperlora_jax.pictures.size_buckets import square
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.subjects.concept_sources import list_concepts
from hyperlora_jax.worlds.by_style import World, open_world

NAMES = tuple(field.name for field in dataclasses.fields(Sizes))


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a source of pictures has.

    Attributes:
        source: what messages call it.
        num_held_out: subjects that were not trained on and can be judged.
        num_candidates: subjects to tell apart, those and others.
        num_views: pictures that can be shown of every held-out subject while one is left to judge
            by.
        num_pictures: different ones that every held-out subject has.
    """

    source: str
    num_held_out: int
    num_candidates: int
    num_views: Sequence[int]
    num_pictures: Sequence[int]


def asked_sizes(section: ConfigDict | Json) -> Sizes:
    """What a config's `evaluate` section asks for.

    Raises:
        UserError: a number that cannot be.
    """
    sizes = Sizes(**{name: section[name] for name in NAMES})
    least = {"num_identities": 1, "num_validation": 0, "num_candidates": 2}
    for name, value in dataclasses.asdict(sizes).items():
        if value < least.get(name, 1):
            raise UserError(
                f"--config.evaluate.{name}: got {value}, expected {least.get(name, 1)} or more"
            )
    return sizes


def fitting_sizes(asked: Sizes, given: frozenset[str], offer: Offer) -> tuple[Sizes, str]:
    """The sizes to use, and a line that says what was cut ("" = nothing).

    Args:
        asked: of the config.
        given: dotted names of the keys that somebody gave a value of their own.

    Raises:
        UserError: nobody is held out, fewer than two subjects to tell apart, or a given number that
            the source does not offer.
    """
    explicit = {name for name in NAMES if f"evaluate.{name}" in given}
    validation, identities = _parted(asked, explicit, offer)
    if offer.num_candidates < 2:
        raise UserError(
            f"{offer.source}: has {offer.num_candidates} subject that can be judged, expected at "
            "least 2 to tell apart"
        )
    candidates = min(asked.num_candidates, offer.num_candidates)
    if candidates < asked.num_candidates and "num_candidates" in explicit:
        raise _not_there("num_candidates", asked, offer.num_candidates, "subjects", offer.source)
    fitted = dataclasses.replace(
        asked,
        num_identities=identities,
        num_validation=validation,
        num_candidates=candidates,
        num_views=_views(asked, explicit, offer),
    )
    return fitted, _said(asked, fitted, offer.source)


def fitting_splits(
    asked: Sizes, given: frozenset[str], source: str, num_validation: int, num_test: int
) -> tuple[Sizes, str]:
    """`fitting_sizes` for a drawn world, which has so many identities in its held-out splits and
    as many pictures of each as one likes."""
    there = {
        "num_identities": num_test,
        "num_validation": num_validation,
        "num_candidates": min(num_validation, num_test),
    }
    for name, count in there.items():
        if getattr(asked, name) > count and f"evaluate.{name}" in given:
            raise _not_there(name, asked, count, "held-out identities", source)
    fitted = dataclasses.replace(
        asked, **{name: min(getattr(asked, name), count) for name, count in there.items()}
    )
    return fitted, _said(asked, fitted, source)


def _said(asked: Sizes, fitted: Sizes, source: str) -> str:
    changed = [
        f"{name} {getattr(fitted, name)} instead of {getattr(asked, name)}"
        for name in NAMES
        if getattr(fitted, name) != getattr(asked, name)
    ]
    return f"sizes that fit {source}: {', '.join(changed)}" if changed else ""


def _parted(asked: Sizes, explicit: set[str], offer: Offer) -> tuple[int, int]:
    """(subjects to choose strengths on, subjects to test)."""
    there, validation, identities = offer.num_held_out, asked.num_validation, asked.num_identities
    if validation + identities <= there:
        return validation, identities
    held_out = "subjects that were not trained on and have two pictures or more"
    if "num_identities" in explicit:
        reserved = validation if "num_validation" in explicit else 0
        if identities + reserved > there:
            raise _not_there("num_identities", asked, there - reserved, held_out, offer.source)
        return min(validation, there - identities), identities
    if "num_validation" in explicit:
        if validation >= there:
            raise _not_there("num_validation", asked, there - 1, held_out, offer.source)
        return validation, there - validation
    share = round(there * validation / (validation + identities))
    validation = min(validation, max(1, share), there - 1)
    return validation, min(identities, there - validation)


def _views(asked: Sizes, explicit: set[str], offer: Offer) -> int:
    most = max(offer.num_views)
    if "num_views" in explicit:
        if asked.num_views > most:
            raise _not_there("num_views", asked, most, "pictures of a subject", offer.source)
        return asked.num_views
    # Half of what the subject in the middle has: the other half is left to judge by.
    middle = sorted(offer.num_pictures)[len(offer.num_pictures) // 2]
    return min(asked.num_views, most, max(1, middle // 2))


def _not_there(name: str, asked: Sizes, there: int, what: str, source: str) -> UserError:
    return UserError(
        f"--config.evaluate.{name}: got {getattr(asked, name)}, but {source} has "
        f"{max(there, 0)} {what} for it"
    )


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

    def judged(self, results: Mapping[str, MethodResult]) -> dict[str, object]:
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
    config: ConfigDict,
    size: int,
    trained_on: frozenset[str],
    training_ids: frozenset[str],
    workdir: Path,
    encoder: ImageEncoder,
) -> Exam:
    """The exam of a config's sections `data` and `evaluate`.

    Args:
        size: pixels of the base model's pictures.
        trained_on: names that the hypernetwork was trained on.
        training_ids: those and all others that a method may have seen.
        workdir: where renders and the judges' embeddings are kept.
        encoder: the encoder that conditions the hypernetwork.

    Raises:
        UserError: too few identities or pictures, or one that was trained on.
    """
    section = config.evaluate
    source = section.source or config.data.source
    given = frozenset(config.get("given", ()))
    asked = asked_sizes(section)
    detects = judges.load_detector(section.detector)
    chosen = choose_judges(section, encoder, size, real=source != "avatars")
    if source == "avatars":
        return _avatar_exam(
            config, asked, given, trained_on, training_ids, workdir, chosen, detects
        )
    listed = list_concepts(str(source), square(size), skip_damaged=config.data.skip_damaged)
    people, strangers, sizes, notes = _subjects(
        config, listed, asked, given, training_ids, str(source)
    )
    validation, test = make_picture_sets(
        people,
        sizes,
        prompts=tuple(section.prompts),
        identity_seed=section.identity_seed,
        training_ids=training_ids,
        strangers=strangers,
        seen=_seen(listed, encoder),
    )
    facts = {
        "source": str(source),
        "split_seed": config.data.split_seed,
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
    config: ConfigDict,
    listed: Sequence[Concept],
    asked: Sizes,
    given: frozenset[str],
    training_ids: frozenset[str],
    source: str,
) -> tuple[list[Subject], list[Subject], Sizes, list[str]]:
    """(held-out subjects, validation first; others to tell apart, the sizes to use, notes)."""
    free = picture_sets.held_out(listed, training_ids)
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
    by_identity: dict[str, Concept] = {}
    for concept in rest:
        if concept.identity not in taken:
            by_identity.setdefault(concept.identity, concept)
    return list(by_identity.values())


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


def _seen(listed: Sequence[Concept], encoder: ImageEncoder) -> Seen:
    """What the condition encoder is shown of a subject: its first references at the encoder's
    size, as training and `hyperlora generate` read them."""
    by_id = {concept.id: concept for concept in listed}
    return lambda name, count: np.stack([*by_id[name].references_at(encoder.image_size)[:count]])


def _avatar_exam(
    config: ConfigDict,
    asked: Sizes,
    given: frozenset[str],
    trained_on: frozenset[str],
    training_ids: frozenset[str],
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
            training_ids=training_ids,
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
