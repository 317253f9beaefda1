"""Models inside the package, by name."""

import importlib.resources
from pathlib import Path

from etils import epath

from hyperlora_jax.errors import UserError

BASES = ("tiny-sd",)
HYPERNETWORK = "avatar-hypernetwork"  # for the base tiny-sd


def shipped_path(name: str) -> Path:
    """Where the package keeps the model of this name."""
    return Path(str(importlib.resources.files("hyperlora_jax"))) / "assets" / name


def checkpoint_path(source: epath.PathLike) -> epath.PathLike:
    """Folder of the shipped hypernetwork for its name; `source` itself for anything else."""
    return shipped_path(HYPERNETWORK) if str(source) == HYPERNETWORK else source


def base_path(source: str) -> str:
    """Folder of a base model called by a name of `BASES`; `source` itself for anything else.

    Raises:
        UserError: the embedded model is not built yet.
    """
    if source not in BASES:
        return source
    folder = shipped_path(source)
    if not folder.is_dir():
        raise UserError(
            f"base {source}: {folder} not found; build it by "
            "`hyperlora pretrain --config configs/tiny_sd.py --workdir DIR`"
        )
    return str(folder)
