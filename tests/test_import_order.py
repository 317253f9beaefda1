"""Imports only point up the list of rooms, rooms stay small, and importing the package is cheap."""

import ast
import collections
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    "stable_diffusion.networks",
    "stable_diffusion.weights",
    "stable_diffusion",
    "encoders",
    "batches",
    "worlds",
    "pictures",
    "targets",
    "subjects",
    "hypernet",
    "train",
    "train.hypernetwork",
    "pretrain",
    "aot",
    "distill",
    "generate",
    "refine",
    "model_card",
    "runtime",
    "serve",
    "evaluate",
    "demo_screen",
    "demo",
    "cli",
]
MOST_FILES = 12  # a room, `cli` aside: one module a command
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in ROOT.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
}


def room_of(module):
    return max((r for r in ROOMS if f"{module}.".startswith(f"{r}.")), key=len, default=None)


def imports_of(path):
    """Modules of this package that a file imports, at its head or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hyperlora_jax"):
            source = node.module.removeprefix("hyperlora_jax").lstrip(".")
            names = {f"{source}.{alias.name}".lstrip(".") for alias in node.names}
            found |= names & MODULES.keys() or {source} & MODULES.keys()
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def test_every_file_has_a_room():
    assert [module for module in MODULES if room_of(module) is None] == []


def test_imports_point_up():
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        # A room inside `evaluate` belongs to it: one idea in four folders.
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module))
    ]
    assert not wrong


def test_no_file_needs_itself():
    below, done = set(), set()

    def visit(module, trail):
        assert module not in below, f"circle: {' -> '.join([*trail, module])}"
        if module in done:
            return
        below.add(module)
        for other in IMPORTS[module]:
            visit(other, [*trail, module])
        below.discard(module)
        done.add(module)

    for module in MODULES:
        visit(module, [])


def test_rooms_stay_small_and_names_tell_files_apart():
    folders = collections.Counter(path.parent.relative_to(ROOT) for path in MODULES.values())
    assert {str(k): n for k, n in folders.items() if n > MOST_FILES and str(k) != "cli"} == {}
    names = collections.Counter(p.stem for p in MODULES.values() if p.parent.name != "cli")
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("room", sorted({path.parent for path in MODULES.values()}))
def test_every_room_says_what_lives_in_it(room):
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))


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
