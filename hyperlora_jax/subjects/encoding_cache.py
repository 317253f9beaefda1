"""Subjects encoded once for all: in files, which hosts share out and a restart finds again.

    FOLDER/encoded/conditions-DIGEST/   00000000.safetensors  00000512.safetensors …
    FOLDER/encoded/latents-DIGEST/      …
    FOLDER/encoded/texts-DIGEST/        …

A file holds the rows of some subjects, of each its own number, and is named after the first; it
appears whole or not at all. What is asked for (pictures, captions, models) is in the digest, so
files never have to be made anew, and runs can share them. A batch reads its rows: how much memory a
run needs does not depend on how many subjects there are. A FOLDER in a bucket is copied to this
host's scratch folder.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

from hyperlora_jax import storage
from hyperlora_jax.array_types import ArrayTree, DType, Params
from hyperlora_jax.batches import ragged
from hyperlora_jax.batches.ragged import Ragged
from hyperlora_jax.batches.row_files import RowFiles
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.lora_files import safetensors_io
from hyperlora_jax.parallel import multihost
from hyperlora_jax.parallel.sharding import on_mesh
from hyperlora_jax.parallel.shared_work import local_mesh
from hyperlora_jax.pictures.lazy_pictures import LazyPictures
from hyperlora_jax.pictures.size_buckets import Size
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.subjects import encoded_subjects
from hyperlora_jax.subjects.encoded_subjects import Encode, EncodedSubjects
from hyperlora_jax.subjects.subject_pictures import SubjectPictures

LAYOUT = 5  # of the files
CHUNK, CHUNK_BYTES = 4096, 2**30  # pictures or texts encoded for one file, and their bytes


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """One kind of what is encoded.

    Attributes:
        name: of its folder, digest included.
        dtype: see `kept_dtype`.
        counts: rows of every subject; of texts, every text is a subject.
        row_bytes: of one picture.
        items: pictures or texts of some subjects, in turn.
        encode: made when there is something to encode.
    """

    name: str
    dtype: np.dtype
    counts: Sequence[int]
    row_bytes: int
    items: Callable[[range], Iterable[ArrayTree]]
    encode: Callable[[], Encode]

    def files(self) -> dict[str, range]:
        """{file: its subjects}: as many as do not exceed the limits, at least one."""
        most = max(1, min(CHUNK, CHUNK_BYTES // self.row_bytes))
        files, first, rows = {}, 0, 0
        for k, count in enumerate(self.counts):
            if rows and rows + count > most:
                files[f"{first:08d}.safetensors"] = range(first, k)
                first, rows = k, 0
            rows += count
        return {**files, f"{first:08d}.safetensors": range(first, len(self.counts))}

    def make(self, file: Path, subjects: range, batch_size: int) -> None:
        """Encodes some subjects, batch by batch, into a file."""
        count = sum(self.counts[subjects.start : subjects.stop])
        title = f"{self.name.split('-')[0]} {subjects.stop}/{len(self.counts)}"
        batches = encoded_subjects.in_batches(
            self.encode(), self.items(subjects), count, batch_size, title
        )
        first = next(batches)
        dtypes = {name: kept_dtype(name, self.dtype) for name in first}
        signature = tuple(
            (name, dtypes[name], (count, *rows.shape[1:])) for name, rows in first.items()
        )
        with safetensors_io.written_in_rows(file, signature) as put:
            row = 0
            for batch in itertools.chain([first], batches):
                for name, rows in batch.items():
                    put(name, row, rows.astype(dtypes[name]))
                row += len(next(iter(batch.values())))


def encode_once(
    folder: epath.PathLike,
    sd: StableDiffusion,
    pictures: SubjectPictures,
    *,
    encoder: ImageEncoder | None = None,
    latents: bool = True,
    texts: bool = True,
    dtype: DType = np.float32,
    batch_size: int = 256,
) -> EncodedSubjects:
    """What frozen models make of subjects' pictures and captions, kept in files below `folder` and
    found again for the same pictures, captions and models. Every device of every host takes part.

    Args:
        folder: the same for all hosts.
        sd: a StableDiffusion.
        encoder: condition encoder of the references, which it is given in its own size; None
            leaves them out.
        latents, texts: whether those of the targets are wanted.
        dtype: what is kept in, float32 or bfloat16; sizes of pictures always in float32.

    Raises:
        UserError: a file cannot be written or read.
    """
    ids, size, stored_dtype = list(pictures.ids), pictures.size, np.dtype(dtype)
    unique, index = encoded_subjects.number_captions(pictures.captions)
    models = _Models(sd, encoder)

    def of_pictures(
        kind: str, images: LazyPictures, model: str, encode: Callable[[], Encode]
    ) -> _Part:
        shown = [images.mark, ids, list(images.counts), list(images.size)]
        name = _named(kind, model, stored_dtype, shown)
        row_bytes = 3 * images.size[0] * images.size[1]
        return _Part(name, stored_dtype, images.counts, row_bytes, images.one_by_one, encode)

    parts: dict[str, _Part] = {}
    if encoder is not None:
        seen = pictures.seen_at(encoder.image_size)
        parts["conditions"] = of_pictures("conditions", seen, encoder.hash, models.references)
    if latents:
        parts["latents"] = of_pictures("latents", pictures.images, models.base, models.latents)
    if texts:
        parts["texts"] = _Part(
            _named("texts", models.base, stored_dtype, [unique, list(size)]),
            stored_dtype,
            [1] * len(unique),
            1,
            lambda chosen: unique[chosen.start : chosen.stop],
            lambda: models.texts(size),
        )
    batch_size = -(-batch_size // models.mesh.size) * models.mesh.size
    arrays = _made(folder, parts, batch_size, f"encoded/{len(ids)} of {size}")
    references = None
    if encoder is not None:
        told = ragged.offsets_of(parts["conditions"].counts)
        references = Ragged(told, arrays["conditions"])
    shown = dict(arrays.get("latents", {}))
    if texts:
        shown["text"] = ragged.shared(index, arrays["texts"])
    targets = Ragged(ragged.offsets_of(pictures.counts), shown) if shown else None
    return EncodedSubjects(tuple(ids), references, targets)


def kept_dtype(name: str, dtype: DType) -> np.dtype:
    """What a table is kept in: `dtype`, but sizes of pictures exactly."""
    return np.dtype(np.float32) if name == "time_ids" else np.dtype(dtype)


class _Models:
    """The frozen models on all devices of this host, from when they have work to do until this
    object is gone.

    Attributes:
        base: tells the base model and its arithmetic from others.
        mesh: this host's devices.
    """

    def __init__(self, sd: StableDiffusion, encoder: ImageEncoder | None):
        self._sd, self._encoder = sd, encoder
        self.base = f"{sd.base_hash} {jax.tree.leaves(sd.params['unet'])[0].dtype}"
        self.mesh = local_mesh()

    def references(self) -> Encode:
        """Pictures -> condition embeddings."""
        return encoded_subjects.references_by(self._told, self.mesh)

    def latents(self) -> Encode:
        """Pictures -> latents."""
        return encoded_subjects.latents_by(self._shown, self.mesh)

    def texts(self, size: Size) -> Encode:
        """Captions -> their embeddings."""
        return encoded_subjects.texts_by(self._shown, size)

    @functools.cached_property
    def _shown(self) -> StableDiffusion:
        params = {name: leaf for name, leaf in self._sd.params.items() if name != "unet"}
        return on_mesh(dataclasses.replace(self._sd, params=params), self.mesh)

    @functools.cached_property
    def _told(self) -> ImageEncoder:
        assert self._encoder is not None
        own = hasattr(self._encoder, "params")  # others keep theirs to themselves
        return on_mesh(self._encoder, self.mesh) if own else self._encoder


def _named(kind: str, model: str, dtype: np.dtype, shown: object) -> str:
    """The name of a folder, which tells what it holds."""
    asked = json.dumps([LAYOUT, model, str(dtype), shown])
    return f"{kind}-{hashlib.sha256(asked.encode()).hexdigest()[:24]}"


def _made(
    folder: epath.PathLike, parts: Mapping[str, _Part], batch_size: int, spoken: str
) -> dict[str, Params]:
    """Tables by name of every part; hosts share out the files that are not there yet.

    Args:
        spoken: what hosts agree under, once in a run.
    """
    # The first process's word counts: files' times can differ between hosts, and listings too.
    own = json.dumps({kind: part.name for kind, part in parts.items()})
    names = json.loads(multihost.agree(f"{spoken}/{'+'.join(parts)}", own))
    jobs = {
        f"encoded/{names[kind]}/{file}": (part, subjects)
        for kind, part in parts.items()
        for file, subjects in part.files().items()
    }
    there = json.dumps([job for job in jobs if (epath.Path(folder) / job).exists()])
    done = set(json.loads(multihost.agree(f"{'/'.join(names.values())}/found", there)))
    missing = [job for job in jobs if job not in done]
    scratch = storage.scratch(folder)
    for job in missing[jax.process_index() :: jax.process_count()]:
        part, subjects = jobs[job]
        part.make(scratch / job, subjects, batch_size)
        storage.push(folder, job)
    if missing:
        multihost.barrier(f"{'/'.join(names.values())}/encoded", multihost.PATIENCE)
    tables = {}
    for kind, part in parts.items():
        storage.pull(folder, f"encoded/{names[kind]}", missing_only=True)
        place = scratch / "encoded" / names[kind]
        tables[kind] = RowFiles([place / file for file in part.files()]).tables()
    return tables
