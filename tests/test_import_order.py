"""Imports only point up the list of rooms, and importing the package is cheap."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import hyperlora_jax

ROOT = Path(hyperlora_jax.__file__).parent
ROOMS = [
    "errors",
    "array_types",
    "shipped",
    "storage",
    "facts",
    "parallel",
    "diffusion",
    "lora",
    "lora_files",
    "stable_diffusion",
    "data",
    "hypernet",
    "train",
    "distill",
    "generate",
    "refine",
    "evaluate",
    "cli",
]


def imported_rooms(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {n.split(".")[1] for n in names if n.startswith("hyperlora_jax.")} & set(ROOMS)


def test_imports_point_up():
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room not in ROOMS:
            continue
        for other in imported_rooms(ast.parse(path.read_text())):
            if ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_import_is_light():
    heavy = "torch, tensorflow_datasets, diffusers, transformers, jax"
    code = (
        f"import sys, hyperlora_jax; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_module_can_be_imported():
    # Linters do not see undefined names in this package: shape strings look like such names.
    for module in pkgutil.walk_packages(hyperlora_jax.__path__, "hyperlora_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
