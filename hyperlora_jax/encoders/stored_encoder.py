"""How a checkpoint keeps its condition encoder, and finds it again.

  ours, CLIP            a copy of the weights in CHECKPOINT/encoder, in their own dtype; without
                        it, the shipped encoder of that name
  ONNX, transformers    path, hash, picture size and options in CHECKPOINT/config.json

Whatever is found must have the hash that the checkpoint was trained with.
"""

import dataclasses
import os

from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.encoders import condition_encoders, named_encoders
from hyperlora_jax.encoders.clip_encoder import ClipImageEncoder, save_clip_vision
from hyperlora_jax.encoders.condition_encoders import FlaxImageEncoder, ImageEncoder
from hyperlora_jax.encoders.foreign_encoders import ForeignImageEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.shipped import shipped_path

FOLDER = "encoder"
Record = Json


def describe(encoder: ImageEncoder) -> dict[str, object]:
    """JSON-able record of an encoder: name, kind, hash, image_size, num_tokens, embedding_dim, and
    of a foreign one the options with which it is read."""
    record = {
        "name": encoder.name,
        "kind": "python",  # an object that somebody made
        "hash": encoder.hash,
        "image_size": list(encoder.image_size),
        "num_tokens": encoder.num_tokens,
        "embedding_dim": encoder.embedding_dim,
    }
    if isinstance(encoder, FlaxImageEncoder):
        return {**record, "kind": condition_encoders.OURS}
    if isinstance(encoder, ClipImageEncoder):
        options = encoder.preprocessing.options("mean", "std")
        return {**record, "kind": condition_encoders.CLIP, "options": options}
    if isinstance(encoder, ForeignImageEncoder):
        return {**record, "kind": encoder.kind, "options": encoder.options}
    return record


def keep(encoder: ImageEncoder, checkpoint: epath.Path) -> dict[str, object]:
    """Copies the encoder into the folder `checkpoint` where it is one that is copied.

    Returns:
      The record for config.json: what `describe` says and, of an encoder that is not copied, its
      path, absolute and relative to `checkpoint` (`near`).

    Raises:
      UserError: the copy cannot be written.
    """
    record, copy = describe(encoder), checkpoint / FOLDER
    source = getattr(encoder, "source", "")
    is_there = source == str(storage.absolute(copy))
    if isinstance(encoder, FlaxImageEncoder) and not is_there:
        condition_encoders.save_encoder(
            copy, encoder.module, encoder.params, encoder.name, encoder.facts, encoder.dtype
        )
    if isinstance(encoder, ClipImageEncoder) and not is_there:
        save_clip_vision(copy, encoder)
    if isinstance(encoder, ForeignImageEncoder):
        record["path"] = source
        if not storage.is_remote(source) and not storage.is_remote(checkpoint):
            record["near"] = os.path.relpath(source, storage.absolute(checkpoint))
    return record


def find(
    checkpoint: epath.Path, record: Record, given: ImageEncoder | epath.PathLike | None = None
) -> ImageEncoder:
    """The encoder that a checkpoint was trained with.

    Args:
      checkpoint: its folder.
      record: what `keep` returned.
      given: an encoder, or the path of one, instead of what the record says.

    Raises:
      UserError: it is nowhere, or what lies there has another hash; the line names both hashes and
        the place.
    """
    owner = f"checkpoint {checkpoint}"
    if given is not None and not isinstance(given, str | os.PathLike):
        return checked(owner, record, given, f"encoder {given.name}")
    if given is not None:
        return read(owner, record, given)
    places = candidates(checkpoint, record)
    refused = []
    for place in places:
        if place.exists():
            try:
                return read(owner, record, place)
            except UserError as error:
                refused.append(error)
    if refused:
        raise refused[0]
    looked = f"found nothing at {', '.join(map(str, places))}" if places else "which has no path"
    raise UserError(
        f"{owner}: was trained with the encoder {titled(record)}, {looked}; "
        "name it by --encoder PATH"
    )


def read(owner: str, record: Record, path: epath.PathLike) -> ImageEncoder:
    """The encoder at a path, with the record's options.

    Raises:
      UserError: none that can be read, or one with another hash than the record's, `owner` being
        what wants it.
    """
    place = epath.Path(path)
    same_kind = place.exists() and named_encoders.kind_of(place) == record.get("kind")
    options = record.get("options", {}) if same_kind else {}
    return checked(
        owner, record, named_encoders.load_condition_encoder(str(path), **options), str(path)
    )


def checked(owner: str, record: Record, encoder: ImageEncoder, place: str) -> ImageEncoder:
    """The encoder, if it has the record's hash; see `read`."""
    if encoder.hash != record["hash"]:
        raise UserError(
            f"{owner}: expects the encoder {titled(record)}, but {place} has the hash "
            f"{encoder.hash[:12]}; name the right one by --encoder PATH"
        )
    if dataclasses.is_dataclass(encoder):  # a copy's folder has a name of its own
        return dataclasses.replace(encoder, name=record["name"])
    return encoder


def candidates(checkpoint: epath.Path, record: Record) -> list[epath.Path]:
    """Where an encoder may lie: in the checkpoint, or at its path, at the same place relative to
    the checkpoint, in it, in its workdir or beside that."""
    copy = checkpoint / FOLDER
    if "path" not in record:
        if not copy.exists() and record["name"] in named_encoders.SHIPPED.values():
            return [epath.Path(shipped_path(str(record["name"])))]
        return [copy] if copy.exists() or record.get("kind") != "python" else []
    path = epath.Path(record["path"])
    places = [path]
    if "near" in record and not storage.is_remote(checkpoint):
        near = os.path.normpath(storage.absolute(checkpoint) / record["near"])
        places.append(epath.Path(near))
    folders = (checkpoint, checkpoint.parent, checkpoint.parent.parent)
    return list(dict.fromkeys([*places, *(folder / path.name for folder in folders)]))


def titled(record: Record) -> str:
    """Name, kind and hash for a message."""
    kind = f"{record['kind']}, " if "kind" in record else ""
    return f"{record['name']} ({kind}{record['hash'][:12]})"
