"""The spool: one finished subject = one safetensors file, written atomically.

A file has its final name only when all of it is on the disk, so whatever is listed by
`finished_files` is complete, and a killed run repeats nothing that it had handed over. A subject
that cannot be fitted leaves a file that says why.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.pictures.subjects import Subject
from hyperlora_jax.targets.lora_sources import Rejected

SUFFIX, REJECTED = ".safetensors", ".rejected.json"
LONGEST = 180  # bytes of a name; file systems take 255
_CUT = "%="  # before the hash of an id that is longer; never a part of a quoted one
_FACTS = ("id", "identity", "captions", "seed", "num_steps", "split")


def spool_path(spool: str | Path, subject_id: str, suffix: str = SUFFIX) -> Path:
    """Where the subject's file lies; any id is allowed, whatever its characters and length."""
    name = quote(subject_id, safe=" +,=@")
    if name.startswith("."):  # hidden, or a half-written file
        name = f"%2E{name[1:]}"
    if len(name) > LONGEST:
        digest = hashlib.sha256(subject_id.encode()).hexdigest()[:32]
        name = f"{name[: LONGEST - 40]}{_CUT}{digest}"
    return Path(spool) / f"{name}{suffix}"


def write_finished(spool: str | Path, subject: Subject) -> Path:
    """Writes a subject: temporary file, fsync, rename. Overwrites an earlier one of this id."""
    tensors: dict[str, np.ndarray] = {"loss_curve": np.asarray(subject.loss_curve, np.float32)}
    if subject.lora is not None:
        tensors["lora"] = np.asarray(subject.lora, np.float32)
    for role in ("references", "targets"):
        for k, encoded in enumerate(getattr(subject, role)):
            tensors[f"{role}/{k:04d}"] = np.frombuffer(encoded, np.uint8)
    for encoder, rows in subject.embeddings.items():
        tensors[f"embeddings/{encoder}"] = np.ascontiguousarray(rows, np.float32)
    facts = {name: getattr(subject, name) for name in _FACTS}
    path = spool_path(spool, subject.id)
    safetensors_io.write(path, tensors, {"subject": json.dumps(facts)})
    return path


def finished_files(spool: str | Path) -> dict[str, Path]:
    """{id: file} of all subjects handed over so far, in the order of their ids; empty for a folder
    that does not exist."""
    paths = [p for p in Path(spool).glob(f"*{SUFFIX}") if not p.name.startswith(".")]
    return dict(sorted((_id(path), path) for path in paths))


def _id(path: Path) -> str:
    name = path.name[: -len(SUFFIX)]
    return _facts(path)["id"] if _CUT in name else unquote(name)


def _facts(path: Path) -> dict:
    """What a file's header says of its subject; UserError where it says nothing."""
    try:
        return json.loads(safetensors_io.read_metadata(path)["subject"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: is no finished subject of a spool ({error})") from None


def fit_settings(path: Path) -> dict[str, int]:
    """What a file's header says of the fit: seed, steps, and numbers of the LoRA."""
    facts, shapes = _facts(path), safetensors_io.read_shapes(path)
    numbers = shapes["lora"][1][0] if "lora" in shapes else 0
    return {"seed": facts["seed"], "num_steps": facts["num_steps"], "num_parameters": numbers}


def write_rejected(spool: str | Path, rejected: Rejected) -> Path:
    """Keeps why a subject could not be fitted."""
    path = spool_path(spool, rejected.id, REJECTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replaced(epath.Path(path), json.dumps(dataclasses.asdict(rejected)).encode())
    return path


def read_rejected(spool: str | Path) -> dict[str, Rejected]:
    """{id: why it could not be fitted}, in the order of the ids."""
    files = Path(spool).glob(f"*{REJECTED}")
    rejected = [Rejected(**json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return {row.id: row for row in sorted(rejected, key=lambda row: row.id)}


def read_finished(path: str | Path) -> Subject:
    """A subject from its spool file. Raises UserError naming the file when it is something else."""
    tensors, metadata = safetensors_io.read(path)
    try:
        facts = json.loads(metadata["subject"])
        pictures: dict[str, list[bytes]] = {"references": [], "targets": []}
        embeddings = {}
        for name, tensor in sorted(tensors.items()):
            group, _, rest = name.partition("/")
            if group in pictures:
                pictures[group].append(tensor.tobytes())
            elif group == "embeddings":
                embeddings[rest] = tensor
        facts["captions"] = tuple(facts["captions"])
        return Subject(
            **facts,
            references=tuple(pictures["references"]),
            targets=tuple(pictures["targets"]),
            lora=tensors.get("lora"),
            embeddings=embeddings,
            loss_curve=tensors["loss_curve"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no finished subject of a spool ({error})") from None
