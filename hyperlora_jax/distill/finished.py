"""The end of a distillation: spool (and an earlier dataset) → dataset, and what is said of it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.distill.record import CONCEPTS, Record, There
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.targets.lora_import import QUARANTINE, quarantine_text
from hyperlora_jax.targets.lora_sources import Rejected
from hyperlora_jax.targets.lora_targets import open_lora_targets
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets
from hyperlora_jax.targets.spool import finished_files, read_finished, read_rejected

_ADVICE = {
    "text states": "do the base's text encoder and tokenizer belong together?",
    "latents": "does the base's autoencoder need distill.dtype=float32?",
    "": "is distill.recipe.learning_rate too high?",
}


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What `distill` has done.

    Attributes:
        path: the dataset.
        asked: how many concepts the run has.
        fitted: how many LoRAs are new; None where nothing was left to do.
        rejected: concepts in quarantine.
        notes: more lines for whoever started it.
    """

    path: epath.Path
    asked: int
    fitted: int | None
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What the command prints."""
        have = self.asked - len(self.rejected)
        if self.fitted is None:
            said = f"already there: {self.path} has LoRAs of {have} of {self.asked} concepts"
        else:
            said = f"wrote {self.path}: LoRAs of {have} concepts"
            said += f", {have - self.fitted} of them were there" if have > self.fitted else ""
        out = [*self.notes, said]
        if self.rejected:
            first = self.rejected[0]
            out.append(
                f"{len(self.rejected)} of {self.asked} concepts in quarantine "
                f"({self.path / QUARANTINE}): {first.id}: {first.reason}"
            )
        return out


def write_dataset(
    asked: Record,
    there: There,
    spool: Path,
    out: epath.Path,
    spec: LoraSpec,
    base_hash: str,
    scratch: Path,
) -> Distilled:
    """Makes the dataset of what the spool, and the dataset before, have of the run's concepts.

    Raises:
        UserError: not one of them could be fitted.
    """
    files, rows = finished_files(spool), rejected_of(spool, out)
    earlier = there.dataset - files.keys()
    have = [name for name in asked.concepts if name in files or name in earlier]
    rejected = tuple(rows[name] for name in asked.concepts if name in rows and name not in have)
    if not have:
        first = rejected[0]
        raise UserError(
            f"all {len(rejected)} concepts are in quarantine, first {first.id}: {first.reason}; "
            f"{_advice(first.reason)}"
        )
    before = open_lora_targets(out) if earlier else None

    def subjects() -> Iterator[Subject]:
        number = {} if before is None else {name: k for k, name in enumerate(before.ids)}
        for name in have:
            if name in files:
                yield dataclasses.replace(read_finished(files[name]), split="train")
            elif before is not None:
                yield before[number[name]]

    texts = {CONCEPTS: lambda: json.dumps(dict(asked.concepts), indent=1)}
    if rejected:
        texts[QUARANTINE] = lambda: quarantine_text(rejected)
    with storage.writing(out, scratch) as folder:
        write_lora_targets(
            folder,
            subjects(),
            spec,
            base_hash,
            facts=asked.facts,
            overwrite=True,
            extra_files=texts,
        )
    fitted = len(files.keys() - there.spool)
    return Distilled(out, len(asked.concepts), fitted, rejected, there.notes)


def rejected_of(spool: Path, out: epath.Path) -> dict[str, Rejected]:
    """{id: why it could not be fitted}, of the spool and the dataset."""
    rows = {}
    if (out / QUARANTINE).exists():
        lines = (out / QUARANTINE).read_text().splitlines()
        rows = {row.id: row for row in (Rejected(**json.loads(line)) for line in lines)}
    return {**rows, **read_rejected(spool)}


def _advice(reason: str) -> str:
    return next(advice for word, advice in _ADVICE.items() if word in reason)
