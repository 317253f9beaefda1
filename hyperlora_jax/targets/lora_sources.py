"""Where existing LoRAs come from: files in folders, and rows of a weights2weights matrix.

Both yield vectors of a spec one at a time, in a fixed order, files parsed ahead by processes, rows
from memory-mapped storage: memory stays bounded whatever the collection's size. What cannot be
used is passed on as a `Rejected` with one reason; nothing stops the rest.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files import load_lora, read_metadata, safetensors_io
from hyperlora_jax.lora_files.peft_directory import adapter_folders
from hyperlora_jax.pictures import pictures
from hyperlora_jax.targets import lora_fitting
from hyperlora_jax.targets.lora_fitting import Fitted
from hyperlora_jax.targets.vector_statistics import factor_slices

LORA_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
MATRIX_SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")
W2W_ALPHA = 27.0
AHEAD = 8  # files parsed ahead per process
ROWS_AT_ONCE = 32
MAPPED_BYTES = 2**28  # pages of a mapped matrix that may stay in memory


@dataclasses.dataclass(frozen=True, eq=False)
class Accepted:
    """One LoRA that fits: its name, its vector with what was lost, a picture beside it if any."""

    id: str
    source: str
    fitted: Fitted
    picture: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Rejected:
    """One LoRA that was not taken, and the one reason."""

    id: str
    source: str
    reason: str


def find_lora_files(paths: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """(id, path) of every LoRA below the paths, sorted; a PEFT adapter folder is one LoRA.

    Ids are paths relative to the given folder without suffix, made unique by the folder's name.
    Raises UserError for a path that does not exist and for paths without any LoRA.
    """
    files: list[tuple[str, Path]] = []
    for given in map(Path, paths):
        if not given.exists():
            raise UserError(f"{given}: no such file or folder, expected LoRAs")
        if given.is_file() or adapter_folders(given):
            files.append((_stem(given), given))
            continue
        for folder, subfolders, names in os.walk(given):
            here = Path(folder)
            subfolders.sort()
            if adapter_folders(here):
                subfolders.clear()
                files.append((str(here.relative_to(given)), here))
                continue
            for name in sorted(names):
                if name.lower().endswith(LORA_SUFFIXES) and not name.startswith("."):
                    path = here / name
                    files.append((str((path.relative_to(given)).with_name(_stem(path))), path))
    if not files:
        shown = ", ".join(map(str, paths))
        raise UserError(f"{shown}: no LoRA files, expected {' '.join(LORA_SUFFIXES)}")
    return unique_names(files)


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in LORA_SUFFIXES else path.name


def unique_names(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Equal ids (two roots, or two formats of one name) get the suffix, then a number."""
    counts = collections.Counter(name for name, _ in files)
    used: set[str] = set()
    result = []
    for name, path in files:
        given = f"{name}{path.suffix}" if counts[name] > 1 else name
        names = itertools.chain([given], (f"{given} {k}" for k in itertools.count(2)))
        chosen = next(n for n in names if n not in used)
        used.add(chosen)
        result.append((chosen, path))
    return result


@dataclasses.dataclass(frozen=True)
class FileReader:
    """Reads one file for a spec; a value, so that it can be sent to other processes."""

    spec: LoraSpec
    base_hash: str = ""
    on_missing: lora_fitting.OnMissing = "error"
    on_extra: lora_fitting.OnExtra = "error"
    alpha: float = W2W_ALPHA  # of a matrix' factors

    def __call__(self, entry: tuple[str, Path]) -> Accepted | Rejected:
        """The LoRA of an (id, path), or the reason why there is none."""
        name, path = entry
        twin = path.with_suffix(".safetensors")
        if path.suffix in LORA_SUFFIXES[1:] and twin.is_file():
            return Rejected(name, str(path), f"the same LoRA as {twin.name} beside it")
        try:
            return Accepted(name, str(path), self._fitted(path), _picture_beside(path))
        except UserError as error:
            return Rejected(name, str(path), str(error).removeprefix(f"{path}: "))
        except Exception as error:  # a hostile file must not end the import of the others
            return Rejected(name, str(path), f"unreadable ({type(error).__name__}: {error})")

    def _fitted(self, path: Path) -> Fitted:
        lora, spec = load_lora(path)
        if self.base_hash:
            made_for = read_metadata(path).get("hyperlora.base_hash", self.base_hash)
            if made_for != self.base_hash:
                raise UserError(
                    f"LoRA of another base: made for base {made_for[:12]}, "
                    f"this base is {self.base_hash[:12]}"
                )
        return lora_fitting.fit_to_spec(lora, spec, self.spec, self.on_missing, self.on_extra)


def read_files(
    files: Sequence[tuple[str, Path]], reader: FileReader, num_workers: int = 1
) -> Iterator[Accepted | Rejected]:
    """Every file as an `Accepted` or a `Rejected`, in the given order.

    With more than one worker files are parsed ahead in that many processes (started afresh, so
    the calling script needs the usual `__main__` guard).
    """
    if num_workers <= 1:
        yield from map(reader, files)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for entry in files:
            waiting.append(pool.submit(reader, entry))
            if len(waiting) >= AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _picture_beside(path: Path) -> bytes | None:
    """PNG of a preview picture with the LoRA's name, the way collections keep them."""
    for suffix in pictures.SUFFIXES:
        for candidate in (path.with_suffix(suffix), path.with_suffix(f".preview{suffix}")):
            if candidate.is_file():
                try:
                    return pictures.encode_png(pictures.load_image(candidate))
                except UserError:
                    return None  # a broken preview is no reason to lose the LoRA
    return None


def is_matrix(path: str | Path) -> bool:
    """Whether a file holds many LoRAs as the rows of one matrix."""
    path = Path(path)
    if not path.is_file() or path.suffix not in MATRIX_SUFFIXES:
        return False
    if path.suffix != ".safetensors":
        return path.suffix == ".npy" or _open_torch(path) is not None
    try:
        tensors, _ = safetensors_io.read(path)
    except UserError:
        return False
    return len(tensors) == 1 and next(iter(tensors.values())).ndim == 2 and not _lora_key(tensors)


def _lora_key(tensors: Iterable[str]) -> bool:
    return any("lora" in key.lower() for key in tensors)


def open_matrix(path: str | Path, num_columns: int):
    """The [n, d] matrix of a .npy, .safetensors or .pt file, memory-mapped, numpy or torch.

    Raises UserError naming the file when it is no matrix of `num_columns` columns.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no readable .npy matrix ({error})") from None
    elif path.suffix == ".safetensors":
        matrix = next(iter(safetensors_io.read(path)[0].values()))
    elif path.suffix in (".pt", ".pth"):
        matrix = _open_torch(path)
        if matrix is None:
            raise UserError(f"{path}: holds no plain tensor, expected a matrix (weights_only)")
    else:
        raise UserError(f"{path}: expected a matrix as .npy, .safetensors or .pt")
    if len(matrix.shape) != 2 or matrix.shape[1] != num_columns:
        raise UserError(
            f"{path}: matrix of shape {list(matrix.shape)}, the spec expects [n, {num_columns}]"
        )
    return matrix


def _open_torch(path: Path):
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path}: reading PyTorch files needs the extra: pip install "hyperlora-jax[torch]"'
        ) from None
    import pickle

    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None
    return loaded if isinstance(loaded, torch.Tensor) else None


def read_matrix(
    path: str | Path,
    spec: LoraSpec,
    alpha: float = W2W_ALPHA,
    prefix: str = "",
) -> Iterator[Accepted | Rejected]:
    """Every row of a matrix of unfolded factors, alpha / rank multiplied into the up factors.

    Ids are six-digit row numbers behind `prefix`. weights2weights' rows are lora_A, lora_B of the
    sites in order, trained with alpha 27; a matrix of folded factors has alpha = rank.
    """
    num_rows = open_matrix(path, spec.num_parameters).shape[0]
    factor = np.ones(spec.num_parameters, np.float32)
    for piece in factor_slices(spec):
        if piece.side == "up":
            factor[piece.start : piece.stop] = alpha / spec.by_path[piece.path].rank
    rows_per_mapping = max(1, MAPPED_BYTES // (4 * spec.num_parameters))
    for begin in range(0, num_rows, rows_per_mapping):
        # A new mapping each time: pages of the old one leave this process' memory.
        matrix = open_matrix(path, spec.num_parameters)
        end = min(begin + rows_per_mapping, num_rows)
        for start in range(begin, end, ROWS_AT_ONCE):
            rows = _as_float32(matrix[start : min(start + ROWS_AT_ONCE, end)]) * factor
            for number, row in enumerate(rows, start):
                name = f"{prefix}{number:06d}"
                source = f"{path}[{number}]"
                if np.isfinite(row).all():
                    yield Accepted(name, source, Fitted(row.copy(), 0.0, 0, 0, 0, 0))
                else:
                    yield Rejected(name, source, "NaN or Inf in the row")
        del matrix


def _as_float32(rows) -> np.ndarray:
    if not isinstance(rows, np.ndarray):  # a torch tensor, possibly bfloat16
        rows = rows.float().numpy()
    return np.asarray(rows, np.float32)
