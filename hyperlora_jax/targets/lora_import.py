"""Existing LoRAs -> a LoRA-target dataset, with a list of those that could not be used."""

import collections
import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.targets import lora_fitting, lora_sources
from hyperlora_jax.targets.lora_sources import Accepted, Rejected
from hyperlora_jax.targets.lora_targets_writer import write_lora_targets

QUARANTINE = "quarantine.jsonl"


@dataclasses.dataclass
class ImportReport:
    """What an import did. `lost` is the share of energy by id, `reasons` counts by message."""

    path: Path
    imported: int = 0
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    lost: dict[str, float] = dataclasses.field(default_factory=dict)
    truncated: int = 0
    padded: int = 0
    incomplete: int = 0
    dropped: int = 0
    unnamed: tuple[str, ...] = ()  # imported, but not in the table of identities
    unused: tuple[str, ...] = ()  # in the table only

    def facts(self) -> dict:
        """JSON-able summary for the dataset's metadata."""
        return {
            "imported": self.imported,
            "quarantined": len(self.rejected),
            "truncated_to_rank": self.truncated,
            "padded_to_rank": self.padded,
            "with_missing_sites": self.incomplete,
            "with_dropped_sites": self.dropped,
            "energy": lora_fitting.describe_losses(self.lost),
        }

    def lines(self) -> list[str]:
        """What the command prints."""
        total = self.imported + len(self.rejected)
        out = [f"{self.imported} of {total} LoRAs imported to {self.path}"]
        for name, value in list(self.facts().items())[2:-1]:
            if value:
                out.append(f"  {name.replace('_', ' ')}: {value}")
        out.append(f"  {lora_fitting.describe_losses(self.lost)}")
        if self.unnamed:
            first = f"{len(self.unnamed)} (first {self.unnamed[0]!r})"
            out.append(f"  not in the table of identities: {first}, each is its own identity")
        if self.unused:
            first = f"{len(self.unused)} (first {self.unused[0]!r})"
            out.append(f"  in the table of identities without a LoRA: {first}")
        if self.rejected:
            out.append(f"  {len(self.rejected)} in quarantine, see {self.path / QUARANTINE}:")
            kinds = collections.Counter(row.reason for row in self.rejected)
            out += [f"    {count:5d}  {reason}" for reason, count in kinds.most_common(8)]
        return out


def import_loras(
    paths: Sequence[str | Path],
    out: str | Path,
    reader: lora_sources.FileReader,
    *,
    identities: Mapping[str, str] | None = None,
    lora_dtype: str = "float32",
    num_workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> ImportReport:
    """Writes all usable LoRAs of files, folders and matrices to a dataset.

    Args:
        paths: LoRA files, folders of them, and weights2weights matrices; rows of a matrix are
            called by their six-digit numbers, behind its name where it is not alone.
        out: the dataset's folder; `quarantine.jsonl` in it lists what was left out and why.
        reader: how they are read: the dataset's layers and rank, the hash of the base.
        identities: identity by id; others are their own identity.
        lora_dtype: as stored.
        num_workers: processes that parse files (above 1 the caller needs a `__main__` guard).

    Raises UserError when no path has a LoRA or none of them can be used.
    """
    spec = reader.spec
    files, matrices = _sort_paths(paths)
    report = ImportReport(Path(out))
    streams: list[Iterable[Accepted | Rejected]] = []
    if files:
        streams.append(lora_sources.read_files(files, reader, num_workers))
    total = len(files)
    alone = len(matrices) == 1 and not files
    for name, path in lora_sources.unique_names([(path.stem, path) for path in matrices]):
        total += lora_sources.open_matrix(path, spec.num_parameters).shape[0]
        prefix = "" if alone else f"{name}/"
        streams.append(lora_sources.read_matrix(path, spec, reader.alpha, prefix))
    facts: dict = {}
    subjects = _subjects(streams, report, facts, identities or {}, total, progress)
    write_lora_targets(
        out,
        subjects,
        spec,
        reader.base_hash,
        facts,
        lora_dtype,
        overwrite=overwrite,
        extra_files={QUARANTINE: lambda: quarantine_text(report.rejected)},
    )
    if identities is not None:
        report.unnamed = tuple(sorted(report.lost.keys() - identities.keys()))
        names = {*report.lost, *(row.id for row in report.rejected)}
        report.unused = tuple(sorted(identities.keys() - names))
    return report


def choose_spec(
    paths: Sequence[str | Path],
    base: StableDiffusion,
    preset: str | None = None,
    rank: int | None = None,
) -> LoraSpec:
    """Layers and rank of the dataset: the preset's, or those of the first LoRA that is sound.

    `base` is a StableDiffusion. A matrix alone is taken as weights2weights: q and v, rank 1.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}, expected at least 1")
    files, matrices = _sort_paths(paths)
    if preset is None and matrices:
        preset = "w2w"
    if preset is not None:
        return base.lora_spec(preset, rank or (1 if matrices else 4))
    problems = []
    for _, path in files:
        try:
            spec = load_lora(path, base)[1]
        except UserError as error:
            problems.append(str(error))
            continue
        return spec.with_rank(rank or spec.max_rank)
    raise UserError(f"none of {len(files)} LoRAs can be imported, first {problems[0]}")


def _sort_paths(paths: Sequence[str | Path]) -> tuple[list[tuple[str, Path]], list[Path]]:
    matrices = [Path(path) for path in paths if lora_sources.is_matrix(path)]
    others = [path for path in paths if Path(path) not in matrices]
    return lora_sources.find_lora_files(others) if others else [], matrices


def _subjects(
    streams: Sequence[Iterable[Accepted | Rejected]],
    report: ImportReport,
    facts: dict,
    identities: Mapping[str, str],
    total: int,
    progress: bool,
) -> Iterator[Subject]:
    from tqdm import tqdm

    with tqdm(total=total, desc="importing LoRAs", disable=not progress) as bar:
        for row in (row for stream in streams for row in stream):
            bar.update()
            if isinstance(row, Rejected):
                report.rejected.append(row)
                continue
            report.imported += 1
            report.lost[row.id] = row.fitted.lost
            report.truncated += row.fitted.num_truncated > 0
            report.padded += row.fitted.num_padded > 0
            report.incomplete += row.fitted.num_missing > 0
            report.dropped += row.fitted.num_dropped > 0
            yield Subject(
                id=row.id,
                identity=identities.get(row.id, row.id),
                references=() if row.picture is None else (row.picture,),
                lora=row.fitted.vector,
            )
    if not report.imported:
        first = report.rejected[0]
        raise UserError(
            f"none of {len(report.rejected)} LoRAs can be imported, "
            f"first {first.source}: {first.reason}"
        )
    facts["import"] = report.facts()


def quarantine_text(rejected: Sequence[Rejected]) -> str:
    """The content of `quarantine.jsonl`."""
    return "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rejected)


def read_identities(path: str | Path) -> dict[str, str]:
    """{id: identity} of a table: CSV with a header (columns id and identity), or a JSON object.

    For a matrix the ids are six-digit row numbers; plain numbers are taken as row numbers.
    Raises UserError naming the file when it is neither.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the identity table ({error})") from None
    if path.suffix == ".json":
        try:
            table = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: no valid JSON ({error})") from None
        if not isinstance(table, dict):
            raise UserError(f"{path}: expected a JSON object of id: identity")
    else:
        rows = list(csv.DictReader(text.splitlines()))
        if not rows or not {"id", "identity"} <= set(rows[0]):
            columns = ", ".join(rows[0]) if rows else "nothing"
            raise UserError(f"{path}: found columns {columns}, expected id and identity")
        table = {row["id"]: row["identity"] for row in rows}
    return {
        (f"{int(key):06d}" if key.isdecimal() else key): str(identity)
        for key, identity in table.items()
    }
