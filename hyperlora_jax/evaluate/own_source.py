"""Whether a checkpoint is asked about the pictures it was trained on, and what follows from it:
which source may be meant, where the report goes, and whether the checkpoint keeps a strength.

`ChosenDefaults` are the strength (and guidance) that an evaluation chose. One rule: an evaluation
on the pictures that the hypernetwork was trained on replaces the defaults of the one before; one on
other pictures leaves them alone. Either is said.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.compare import MethodResult
from hyperlora_jax.evaluate.protocol import Questions
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.subjects.concept_sources import split_paths

REPORT = "report"


def check_source(config: ConfigDict, facts: Json, workdir: epath.PathLike) -> None:
    """Raises UserError when a config means other pictures than a hypernetwork's facts name, and
    nobody said so: `evaluate.source` is empty and `data.source` was not given."""
    given = frozenset(config.get("given", ()))
    trained, data = facts.get("data", {}), config.data
    if "source" not in trained or config.evaluate.source:
        return
    if "data.source" not in given and not _same(str(trained["source"]), str(data.source)):
        raise UserError(
            f"{workdir} was trained on {trained['source']}, but the config says data.source = "
            f"{data.source}: name the one to evaluate on by --config.evaluate.source"
        )
    # Configs for folders of pictures have no style.
    style = trained.get("style", data.get("style"))
    if data.source == "avatars" and style != data.style and "data.style" not in given:
        raise UserError(
            f"{workdir} was trained on {style}, but the config says data.style = {data.style}: "
            "name the one to evaluate on by --config.data.style"
        )


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    places = [{Path(path).resolve() for path in split_paths(given)} for given in (one, other)]
    return "avatars" not in (one, other) and places[0] == places[1]


def report_folder(workdir: epath.PathLike, asked: Mapping[str, object], *, own: bool) -> epath.Path:
    """WORKDIR/report for the checkpoint's own pictures, WORKDIR/report-NAME for others, so that no
    report takes the place of another source's.

    Args:
        asked: facts of the test set.
    """
    root, name = epath.Path(workdir), source_name(asked)
    if own:
        return root / REPORT
    plain = re.sub(r"[^\w.-]+", "-", name)
    folder = root / f"{REPORT}-{plain}"
    if _source_of(folder) in (None, _source(asked)):
        return folder
    return root / f"{REPORT}-{plain}-{hashlib.sha256(_source(asked).encode()).hexdigest()[:6]}"


def source_name(asked: Mapping[str, object]) -> str:
    """What readers call the pictures of a set with these facts."""
    return ", ".join(Path(path).name for path in _source(asked).split(","))


def _source(asked: Mapping[str, object]) -> str:
    return str(asked.get("source", asked.get("style", "")))


def _source_of(folder: epath.Path) -> str | None:
    """The source of the report in a folder, None where there is none."""
    file = folder / "metrics.json"
    try:
        return _source(json.loads(file.read_text())["evaluation"]["test"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclasses.dataclass(frozen=True)
class ChosenDefaults:
    """What was chosen.

    Attributes:
        strength: the default before, and the best one on validation subjects.
        guidance: likewise; None where there was nothing to choose.
        chosen_on: the validation subjects, in words.
        kept: whether the checkpoint keeps it.
    """

    strength: tuple[float, float]
    guidance: tuple[float, float] | None
    chosen_on: str
    kept: bool

    @classmethod
    def of(
        cls, hyper: Hypernetwork, chosen: MethodResult, validation: Questions, *, kept: bool
    ) -> "ChosenDefaults":
        """From the result of the hypernetwork's own LoRAs."""
        guidance = None
        if chosen.guidance_curve:
            guidance = (hyper.default_draw.guidance, chosen.guidance)
        count = validation.num_identities
        return cls(
            (hyper.default_strength, chosen.strength),
            guidance,
            f"{count} validation {'subject' if count == 1 else 'subjects'} of "
            f"{source_name(validation.facts)}",
            kept,
        )

    def applied(self, hyper: Hypernetwork) -> Hypernetwork:
        """The hypernetwork with them as its defaults."""
        generate = dict(hyper.facts.get("generate", {}))
        if self.guidance is not None:
            generate["guidance"] = self.guidance[1]
        return hyper.with_facts(
            default_strength=self.strength[1],
            default_strength_chosen_on=self.chosen_on,
            generate=generate,
        )

    def line(self, where: str) -> str:
        """What happened to the defaults of the checkpoint `where`."""
        pairs = {"strength": self.strength, "guidance": self.guidance}
        said = {name: pair for name, pair in pairs.items() if pair is not None}
        if self.kept:
            changes = [f"default {name} {_change(*pair)}" for name, pair in said.items()]
            return f"{where}: {', '.join(changes)}, chosen on {self.chosen_on}"
        changes = [f"default {name} stays {pair[0]:g}" for name, pair in said.items()]
        best = ", ".join(f"{name} {pair[1]:g}" for name, pair in said.items())
        return (
            f"{where}: {', '.join(changes)}, as these are not the pictures that it was trained on "
            f"(best on {self.chosen_on}: {best})"
        )

    def to_json(self) -> Json:
        """All of it."""
        return dataclasses.asdict(self)


def _change(before: float, now: float) -> str:
    return f"stays {now:g}" if before == now else f"{before:g} → {now:g}"
