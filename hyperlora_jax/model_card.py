"""Model cards: the README.md of what is given away, in the form of Hugging Face's hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from etils import epath
from huggingface_hub import ModelCardData

from hyperlora_jax import shipped, storage
from hyperlora_jax.errors import UserError

FILE = "README.md"
LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
UNKNOWN = "unknown"
SCORES = {
    "identity_top1": "identity, top-1",
    "image_error": "error (MSE)",
    "caption_parts": "caption parts",
}
IN_JAX = "hyperlora generate --checkpoint . --reference a.png --out a.safetensors"
IN_PYTORCH = "python generate.py --reference a.png --out a.safetensors"
LIMITS = """## Use and limits

For pictures of subjects like those it was trained on, with the base named above; on any other base
the result is undefined. A reference unlike the training subjects gives a LoRA that may show
somebody else: `hyperlora generate` prints a familiarity for that reason.

A LoRA made from pictures of a person can draw that person in situations that never happened. Make
and share one only with that person's consent, and say of its pictures that they were generated.
The licence of the base binds what is derived from it.
"""


def of_hypernetwork(
    facts: Mapping[str, object], model: Mapping[str, object], own: str, command: str = IN_JAX
) -> str:
    """The card of an exported hypernetwork.

    Args:
        facts: of the checkpoint's config.json (`base`, `num_steps`, `trained_on`, …).
        model: its architecture.
        own: folder or workdir of the checkpoint, whose newest report of `hyperlora evaluate` is
            quoted.
        command: that makes a LoRA inside the folder.
    """
    base, licence = found_base(str(facts["base"]))
    data = facts.get("data")
    source = data.get("source", data.get("style")) if isinstance(data, Mapping) else None
    rows = [
        ("generator", model.get("generator", UNKNOWN)),
        ("subjects trained on", len(_listed(facts.get("trained_on"))) or UNKNOWN),
        ("their pictures", Path(str(source)).name if source else UNKNOWN),
        ("steps", facts.get("num_steps", UNKNOWN)),
        *_of_base(facts, base, licence),
    ]
    return _card(
        base,
        licence,
        Path(own).absolute().name,
        "A hypernetwork: it writes a LoRA for its base from a reference picture, in one pass.",
        ["hypernetwork", "lora"],
        "## Training\n\n" + _table(rows),
        _measured(own),
        f"## How to use\n\n```\n{command}\n```",
        LIMITS,
    )


def of_loras(
    facts: Mapping[str, object], names: Sequence[str], strength: float, format: str
) -> str:
    """The card of a folder of generated LoRA files.

    Args:
        facts: of the checkpoint that wrote them.
        names: of the files, or folders.
        strength: that is already multiplied in.
    """
    base, licence = found_base(str(facts["base"]))
    rows = [
        ("LoRAs", len(names)),
        ("form", format),
        ("strength, multiplied in", f"{strength:g}"),
        *_of_base(facts, base, licence),
    ]
    files = "\n".join(f"- `{name}`" for name in names)
    return _card(
        base,
        licence,
        "Generated LoRAs",
        "LoRAs that a hypernetwork wrote from reference pictures, without training.",
        ["lora", "diffusers", "text-to-image"],
        "## Files\n\n" + _table(rows) + "\n\n" + files,
        LIMITS,
    )


def of_base(base: str, facts: Mapping[str, object]) -> str:
    """The card of an exported base model.

    Args:
        base: the base that it was made from; empty for one from nothing.
        facts: rows of its table.
    """
    name, licence = found_base(base) if base else ("", UNKNOWN)
    return _card(
        name,
        licence,
        "Stable Diffusion, trained further" if base else "Stable Diffusion, trained from nothing",
        "A folder of PyTorch diffusers.",
        ["diffusers", "text-to-image", "stable-diffusion"],
        "## Training\n\n" + _table([*facts.items(), ("licence of the base", licence)]),
        LIMITS,
    )


def write(folder: epath.PathLike, text: str) -> None:
    """Writes README.md; one that is there and was written by somebody else stays."""
    path = epath.Path(folder) / FILE
    if path.exists() and f"library_name: {LIBRARY}" not in path.read_text():
        return
    storage.replaced(path, text.encode())


LIBRARY = "hyperlora_jax"


def found_base(base: str) -> tuple[str, str]:
    """Name and licence of a base, as it was found: the licence from the metadata of its README.md,
    else the first line of its LICENSE file; "unknown" where it names none.

    Args:
        base: a name of `shipped.BASES`, a folder, a single file or a hub id.
    """
    if base in shipped.BASES:
        return base, "apache-2.0"
    folder = epath.Path(base)
    if not folder.exists():
        return base, UNKNOWN
    if folder.is_file():
        return folder.name, UNKNOWN
    return folder.name, _licence(folder)


def _licence(folder: epath.Path) -> str:
    card = folder / FILE
    if card.exists():
        lines = card.read_text().splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:]:
                if line.strip() == "---":
                    break
                key, _, value = line.partition(":")
                if key == "license" and value.strip():
                    return value.strip().strip("'\"")
    for name in LICENSES:
        if (folder / name).exists():
            lines = [line.strip() for line in (folder / name).read_text().splitlines()]
            if first := next(filter(None, lines), ""):
                return first
    return UNKNOWN


def _of_base(facts: Mapping[str, object], base: str, licence: str) -> list[tuple[str, object]]:
    return [
        ("base", f"{base}, family {facts.get('family', UNKNOWN)}"),
        ("hash of the base", f"`{facts.get('base_hash', UNKNOWN)}`"),
        ("licence of the base", licence),
    ]


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def _card(base: str, licence: str, title: str, first: str, tags: list[str], *parts: str) -> str:
    spdx = licence if licence == licence.lower() and " " not in licence else "other"
    data = ModelCardData(
        base_model=base or None,
        library_name=LIBRARY,
        license=None if licence == UNKNOWN else spdx,
        tags=tags,
    )
    body = "\n\n".join(part for part in (f"# {title}", first, *parts) if part)
    return f"---\n{data.to_yaml()}\n---\n\n{body.rstrip()}\n"


def _table(rows: Sequence[tuple[str, object]]) -> str:
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"|  |  |\n| --- | --- |\n{lines}"


def _measured(own: str) -> str:
    """The scores of WORKDIR/report/metrics.json; nothing where nothing was evaluated."""
    root = epath.Path(own)
    places = [root / "report" / "metrics.json", root.parent / "report" / "metrics.json"]
    file = next((place for place in places if place.exists()), None)
    if file is None:
        return "## Measured\n\nNothing yet: `hyperlora evaluate` measures it on held-out subjects."
    try:
        metrics = json.loads(file.read_text())
        rows = []
        for method in ("generated", "conventional", "nearest", "base"):
            values = [metrics.get(score, {}).get(method, {}).get("mean") for score in SCORES]
            if any(value is not None for value in values):
                texts = ["–" if value is None else f"{value:.4g}" for value in values]
                rows.append(f"| {method} | {' | '.join(texts)} |")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read as a report ({error})") from None
    head = f"| LoRA | {' | '.join(SCORES.values())} |\n| --- | ---: | ---: | ---: |"
    return "## Measured\n\nOn held-out subjects, by `hyperlora evaluate`:\n\n" + "\n".join(
        [head, *rows]
    )
