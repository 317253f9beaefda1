"""The spool: one finished subject = one safetensors file, written atomically.

A file has its final name only when all of it is on the disk, so whatever is listed by
`finished_ids` is complete, and a killed run repeats nothing that it had handed over.
"""

import json
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from hyperlora_jax.data.subjects import Subject
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora_files import safetensors_io

SUFFIX = ".safetensors"
_FACTS = ("id", "identity", "captions", "seed", "num_steps", "split")


def spool_path(spool: str | Path, subject_id: str) -> Path:
    """Where the subject's file lies; any character is allowed in an id."""
    return Path(spool) / (quote(subject_id, safe=" +,=@") + SUFFIX)


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


def finished_ids(spool: str | Path) -> set[str]:
    """Ids of all subjects handed over so far; empty for a folder that does not exist."""
    return {subject_id for subject_id, _ in _files(spool)}


def _files(spool: str | Path) -> list[tuple[str, Path]]:
    paths = [p for p in Path(spool).glob(f"*{SUFFIX}") if not p.name.startswith(".")]
    return sorted((unquote(path.name[: -len(SUFFIX)]), path) for path in paths)


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


class Spool:
    """The finished subjects of a folder, in the order of their ids; read one at a time."""

    def __init__(self, spool: str | Path):
        self.files = _files(spool)
        if not self.files:
            raise UserError(f"{spool}: has no finished LoRAs (*{SUFFIX}), expected at least one")

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self):
        return (read_finished(path) for _, path in self.files)
