"""Whether a checkpoint is asked about the pictures it was trained on, and what follows from it:
which source may be meant, where the report goes, and whether the checkpoint keeps a strength."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from hyperlora_jax.data.concept_sources import split_paths
from hyperlora_jax.errors import UserError

REPORT = "report"


def check_source(config: Any, facts: Mapping[str, Any], workdir: epath.PathLike) -> None:
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


def report_folder(workdir: epath.PathLike, asked: Mapping[str, Any], *, own: bool) -> epath.Path:
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


def source_name(asked: Mapping[str, Any]) -> str:
    """What readers call the pictures of a set with these facts."""
    return ", ".join(Path(path).name for path in _source(asked).split(","))


def _source(asked: Mapping[str, Any]) -> str:
    return str(asked.get("source", asked.get("style", "")))


def _source_of(folder: epath.Path) -> str | None:
    """The source of the report in a folder, None where there is none."""
    file = folder / "metrics.json"
    try:
        return _source(json.loads(file.read_text())["evaluation"]["test"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
