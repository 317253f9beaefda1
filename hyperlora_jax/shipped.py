"""Models inside the package, by name."""

import importlib.resources
from pathlib import Path

from hyperlora_jax.errors import UserError

BASES = ("tiny-sd",)


def base_path(source: str) -> str:
    """Folder of a base model called by a name of `BASES`; `source` itself for anything else.

    Raises:
        UserError: the embedded model is not built yet.
    """
    if source not in BASES:
        return source
    folder = Path(str(importlib.resources.files("hyperlora_jax"))) / "assets" / source
    if not folder.is_dir():
        raise UserError(
            f"base {source}: {folder} not found; build it by "
            "`hyperlora pretrain --config configs/tiny_sd.py --workdir DIR`"
        )
    return str(folder)
