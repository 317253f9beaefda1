"""Writes docs/compatibility.md from the tables that the package reads and writes by.

python tools/compatibility_page.py
"""

import dataclasses
import itertools
import pathlib

from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import compatibility, keys, lora_config
from hyperlora_jax.lora_files.header import FAMILIES, NAMES
from hyperlora_jax.lora_files.writing import FORMATS

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SITES = (
    LoraSite(_ATTENTION, 640, 640, 4),
    LoraSite("down_blocks.1.resnets.0.conv1", 320, 640, 4, "conv", (3, 3)),
    LoraSite("time_embedding.linear_1", 320, 1280, 4),
    LoraSite("text_encoder.text_model.encoder.layers.0.mlp.fc1", 768, 3072, 4),
)
# How each tool's rules were had (tests/lora_files).
CHECKED = {
    "diffusers": "0.42.1: loads what is written, every layer compared",
    "diffusers 0.33": "0.33.1 with PEFT 0.15.2, transformers 4.51.3 (slow tests), likewise",
    "PEFT": "0.21.2, and 0.15.2 in the slow tests, likewise",
    "kohya sd-scripts": "rules measured; not run in the tests",
    "LyCORIS": "4.1.3: its wrapper on UNets of diffusers' and of sgm names and on text encoders, "
    "every layer compared (slow tests: UNet of SD 1 and 2)",
    "ComfyUI": "a125cd84 (2025-10-12): its comfy/lora.py and weight_adapter run on every form and "
    "on 42 odd files, every layer compared; the counts are kept in the tests",
    "A1111": "rules read in its source; not run",
    "stable-diffusion.cpp": "rules measured; a test for those who have it",
}


# findings/hotswap_of_mixed_ranks.sh, of attention: one scale, that of the commonest rank, for all.
SWAPPED = (
    "kohya", "diffusers, swapped in place (`hotswap=True`)", "1.x", "attention: full",
    "attention: wrong strengths",
    "each layer is scaled by alpha / the commonest rank (`findings/hotswap_of_mixed_ranks.sh`)",
)  # fmt: skip


def page() -> str:
    """The whole text."""
    return "\n".join(
        [
            "# Which LoRA files are read and written, and by whom they are loaded",
            "",
            "Written by `python tools/compatibility_page.py` from the package's own tables.",
            "`hyperlora inspect FILE` says the same of one file, layer by layer. Files that",
            "PyTorch saved (.bin, .pt, .pth, .ckpt) are read too, where it is installed.",
            *_written(),
            *_tools(),
            *_read(),
            *_configs(),
            "",
        ]
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)]


def _written() -> list[str]:
    """What every tool makes of every form, for layers of four sorts, of equal and of two ranks."""
    mixed = LoraSpec((SITES[0], dataclasses.replace(SITES[1], rank=2), *SITES[2:]))
    rows: dict[tuple[str, ...], list[str]] = {}
    for format, family in itertools.product(FORMATS, FAMILIES):
        form = compatibility.written_form(format, family)
        if form in ("peft", "weights2weights"):
            continue
        reports = (compatibility.report(spec, family, form) for spec in (LoraSpec(SITES), mixed))
        for equal, other in zip(*reports, strict=True):
            if equal.tool != "PEFT":
                words = (format, equal.tool, _loads(equal), _loads(other), other.reason)
                rows.setdefault(words, []).append(NAMES[family].removeprefix("Stable Diffusion "))
    head = ("`--format`", "tool", "base", "equal ranks", "mixed ranks", "why not all")
    table = [(words[0], words[1], ", ".join(names), *words[2:]) for words, names in rows.items()]
    return [
        "",
        "## Written: by form, tool and base",
        "",
        f"Of {len(SITES)} layers: attention, a 3×3 convolution, a time embedding, a text encoder. "
        "`peft` and `weights2weights` are adapter folders, for PEFT only, which loads all.",
        *_table(head, [*table, SWAPPED]),
    ]


def _loads(row: compatibility.ToolReport) -> str:
    return f"{row.num_sites} of {len(SITES)}" if row.status == "part" else row.status


def _tools() -> list[str]:
    rows = [(tool, CHECKED[tool]) for tool in compatibility.TOOLS]
    return ["", "## Checked with", *_table(("tool", "version, and how"), rows)]


def _read() -> list[str]:
    roles = {role: [p.pattern for p, r in keys.ROLES if r == role] for _, role in keys.ROLES}
    rows = []
    for role, patterns in roles.items():
        what = "refused by name: no plain LoRA"
        if role in keys.PLAIN:
            what = "read"
        elif role in keys.JOINED:
            what = "read: times the down factor it is a down factor"
        elif role in keys.CONVERTED:
            what = "with a base: the best LoRA of `--rank`, its error said; else refused"
        elif role in keys.DIFFERENCES:
            what = "left out with `--drop differences`, its share said; else refused"
        shown = "<br>".join(f"`{pattern}`".replace("|", "\\|") for pattern in patterns)
        rows.append((role, what, shown))
    forms = (keys.__doc__ or "").partition("\n\n")[2].rstrip().splitlines()
    return [
        "",
        "## Read: by the names of keys",
        "",
        "```",
        *forms,
        "```",
        *_table(("tensor", "what is done", "key"), rows),
    ]


def _configs() -> list[str]:
    plain = ", ".join(map(repr, lora_config.PLAIN_INITIALISATIONS))
    rows = [
        ("honoured", _names(lora_config.HONOURED)),
        ("harmless", _names(lora_config.HARMLESS)),
        (
            "refused when set: the factors alone are not the change",
            _names(lora_config.REFUSED - {"use_dora"}),
        ),
        (f"`init_lora_weights` refused unless {plain}: it changes the base", "init_lora_weights"),
        ("read with a base, like their tensors", _names([*lora_config.OTHER_KINDS, "use_dora"])),
    ]
    return ["", "## Read: fields of a PEFT config", "", "A field in none of these is an error.",
            *_table(("what is done", "fields"), rows)]  # fmt: skip


def _names(names) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
