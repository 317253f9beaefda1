"""What a distillation is made of, and what of it is there already: nothing is mixed unasked.

    WORKDIR/spool/facts.json         written before the first LoRA
    WORKDIR/targets/metadata.json    facts of the finished dataset; concepts.json beside it

Settings must be equal. Concepts may become more: the LoRAs that are there are taken over. Of a
concept with a LoRA the pictures must be the same, by their content.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json, JsonDict
from hyperlora_jax.errors import UserError
from hyperlora_jax.facts import differences, refusal
from hyperlora_jax.targets.lora_import import QUARANTINE
from hyperlora_jax.targets.spool import finished_files, fit_settings, read_rejected

FILE, CONCEPTS = "facts.json", "concepts.json"
# Facts of pictures that grow with the number of concepts, or are shown only.
_OF_ALL = ("num_identities", "pictures", "concepts_by_size", "size", "start", "licence")
_LATER = ("base_hash", "spec", "preset", "rank", "buckets", "splits", "prior", "steps_per_call")


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run is asked for.

    Attributes:
        facts: settings that a LoRA depends on, JSON-able.
        concepts: id → mark of its pictures and captions; "" where the facts say it all.
        num_parameters: numbers of a LoRA.
    """

    facts: Json
    concepts: Mapping[str, str]
    num_parameters: int


@dataclasses.dataclass(frozen=True)
class There:
    """What a workdir holds of a run.

    Attributes:
        spool: ids with a LoRA in the spool; dataset: with one in the finished dataset.
        rejected: ids that could not be fitted.
        complete: the dataset has all that is asked for.
        notes: what is worth a line.
    """

    spool: frozenset[str]
    dataset: frozenset[str]
    rejected: frozenset[str]
    complete: bool
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> frozenset[str]:
        """What is not to be fitted again."""
        return self.spool | self.dataset | self.rejected


def compare(record: Record, spool: Path, targets: epath.Path) -> There:
    """What is there of a run, whose settings and pictures are those of the record.

    Raises:
        UserError: LoRAs of other settings, of other pictures, or of concepts that this run does not
            have besides new ones; a file that cannot be read.
    """
    marks, notes = {}, []
    dataset, unusable = frozenset[str](), frozenset[str]()
    if (targets / "metadata.json").exists():
        dataset, unusable, marks = _check_dataset(record, targets)
    fitted = finished_files(spool)
    rejected = read_rejected(spool)
    if (spool / FILE).exists():
        spooled = _read_json(epath.Path(spool / FILE))
        _refuse(str(spool), spooled["facts"], record.facts)
        marks = {**marks, **spooled["concepts"]}
    elif fitted and not dataset:
        notes.append(_adopted(record, spool, fitted))
    has_lora = dataset | frozenset(fitted)
    asked = record.concepts.keys()
    for name in sorted(has_lora & asked & marks.keys()):
        if marks[name] != record.concepts[name]:
            raise UserError(
                f"{spool.parent}: the LoRA of concept {name!r} was fitted to pictures of hash "
                f"{marks[name][:12]}, they now have {record.concepts[name][:12]}; "
                "use another workdir"
            )
    # One with other pictures now deserves another attempt.
    gone = {name for name in rejected if marks.get(name) != record.concepts.get(name)}
    rejected_now = (frozenset(rejected) - gone) | unusable
    complete = bool(dataset) and asked <= dataset | rejected_now
    if dataset and not complete and not dataset <= asked:
        strange = min(dataset - asked)
        raise UserError(
            f"{targets}: holds {len(dataset)} concepts, of which this run lacks {strange!r} though "
            "it has new ones; expected the same folder or more of it, or another workdir"
        )
    if surplus := frozenset(fitted) - asked - dataset:
        notes.append(f"{len(surplus)} LoRAs of the spool are of other concepts and stay there")
    return There(frozenset(fitted), dataset, rejected_now, complete, tuple(notes))


def write(record: Record, spool: Path) -> Path:
    """Keeps the facts beside the spool, and the marks of all concepts that ever were asked for."""
    file = spool / FILE
    spool.mkdir(parents=True, exist_ok=True)
    before = _read_json(epath.Path(file))["concepts"] if file.exists() else {}
    content = {"facts": record.facts, "concepts": {**before, **record.concepts}}
    storage.replaced(epath.Path(file), json.dumps(content, indent=1).encode())
    return file


def _check_dataset(
    record: Record, targets: epath.Path
) -> tuple[frozenset[str], frozenset[str], dict[str, str]]:
    """(ids with a LoRA, ids in quarantine, marks) of a finished dataset of the same settings."""
    metadata, index = (_read_json(targets / name) for name in ("metadata.json", "index.json"))
    facts = metadata["facts"]
    if "recipe" not in facts:
        raise UserError(
            f"{targets}: is a dataset that `hyperlora distill` did not make; use another workdir"
        )
    fitted = {"spec": metadata["fingerprint"], "base_hash": metadata["base_hash"]}
    _refuse(str(targets), {**facts, **fitted}, record.facts)
    marks = _read_json(targets / CONCEPTS) if (targets / CONCEPTS).exists() else {}
    lines = []
    if (targets / QUARANTINE).exists():
        lines = (targets / QUARANTINE).read_text().splitlines()
    bad = {json.loads(line)["id"] for line in lines}
    ids = {row[0] for rows in index.values() for row in rows}
    still = {name for name in bad if marks.get(name) == record.concepts.get(name)}
    return frozenset(ids), frozenset(still), marks


def _refuse(where: str, saved: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """UserError naming both sides of the settings that differ; older facts lack some of them."""
    defaults = {name: expected[name] for name in _LATER if name not in saved and name in expected}
    differing = differences(_settings({**defaults, **saved}), _settings(expected))
    if differing:
        raise UserError(refusal(where, differing))


def _settings(facts: Json) -> Json:
    """Facts that all LoRAs of a run share."""
    pictures = {k: v for k, v in facts.get("pictures", {}).items() if k not in _OF_ALL}
    if pictures.get("source") != "avatars":
        pictures["source"] = "files"  # told by each concept's mark, wherever they lie
    return {**facts, "pictures": pictures}


def _adopted(record: Record, spool: Path, fitted: Mapping[str, Path]) -> str:
    """A spool of a version that kept no facts: what its files say must agree.

    Raises:
        UserError: it does not.
    """
    recipe = record.facts["recipe"]
    ends_early = recipe["plateau_window"] is not None
    for name, file in fitted.items():
        settings = fit_settings(file)
        wanted = {
            "seed": record.facts["seed"],
            "num_steps": recipe["num_steps"],
            "num_parameters": record.num_parameters,
        }
        if ends_early:
            wanted["num_steps"] = min(settings["num_steps"], recipe["num_steps"])
        if unequal := differences(settings, wanted):
            raise UserError(refusal(f"{spool}: the LoRA of {name!r}", unequal))
    return (
        f"{spool}: {len(fitted)} LoRAs of an older version are taken over; their seed, steps and "
        "size agree, their recipe was not kept"
    )


def _read_json(file: epath.Path) -> JsonDict:
    try:
        return json.loads(file.read_text())
    except Exception as error:  # a bucket's file system has errors of its own
        raise UserError(f"{file}: cannot be read ({storage.reason(error)})") from error
