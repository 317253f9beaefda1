"""Do attribute directions do what they say? Edits LoRAs of held-out avatars and looks.

    python tools/edit_avatars.py --targets runs/targets/targets --checkpoint runs/avatars \\
        --json docs/measurements/edits.json --picture docs/pictures/edits.png

A linear judge learns each attribute from exact pictures of training identities under one caption;
it then looks at pictures that edited LoRAs draw of held-out identities under that caption.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

LONG, DARK = "long", ("a26d3d", "8d5524", "b68655")
ATTRIBUTES = ("long hair", "dark skin", "beard")
AMOUNTS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
NUM_RENDERS, NUM_TESTS, NUM_IDENTITIES, ROWS = 1200, 300, 32, 4
RIDGE = 30.0
VIEW = 3  # of the training views


def attributes(hair: str, skin: str, beard: str) -> list[bool]:
    """What a pixel-art avatar of these parts shows, in the order of `ATTRIBUTES`."""
    return [hair.startswith(LONG), skin in DARK, beard != "no"]


def learn_judge(pictures: np.ndarray, shown: np.ndarray) -> Any:
    """Ridge regression of ±1 on pixels: pictures [n, h, w, 3] → scores [n, attributes]."""
    flat = pictures.reshape(len(pictures), -1)
    mean, signs = flat.mean(axis=0), 2.0 * shown - 1.0
    gram = (flat - mean) @ (flat - mean).T + RIDGE * np.eye(len(flat))
    weights = (flat - mean).T @ np.linalg.solve(gram, signs - signs.mean(axis=0))
    offset = signs.mean(axis=0)
    return lambda seen: (seen.reshape(len(seen), -1) - mean) @ weights + offset


def measure(given: argparse.Namespace) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(numbers, pictures by column)."""
    import jax

    from hyperlora_jax.hypernet.editing import edit, fit_directions
    from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
    from hyperlora_jax.stable_diffusion.embedded import load_base
    from hyperlora_jax.targets.lora_targets import open_lora_targets
    from hyperlora_jax.worlds.by_style import open_world

    world, view_of = open_world("pixel-art"), lambda k: world.views("train", k + 1)[k]
    view = view_of(VIEW)

    def render(pairs: list) -> np.ndarray:
        return np.asarray(world.render_many(pairs, progress=False), np.float32) / 255.0

    def parts(person: Any) -> list[bool]:
        hair, _, skin, beard = person.classes
        return attributes(hair, skin, beard)

    people = [world.identity("train", k) for k in range(NUM_RENDERS + NUM_TESTS)]
    exact, shown = render([(p, view) for p in people]), np.array([parts(p) for p in people])
    judge = learn_judge(exact[:NUM_RENDERS], shown[:NUM_RENDERS])
    right = ((judge(exact[NUM_RENDERS:]) > 0) == shown[NUM_RENDERS:]).mean(axis=0)

    sd, hyper = load_base("tiny-sd"), Hypernetwork.restore(given.checkpoint)
    targets = open_lora_targets(given.targets, hyper.spec, sd.base_hash)
    names = [name.rpartition("/")[2].split(".") for name in targets.identities]
    labels = np.array([attributes(hair, skin, beard) for hair, _, skin, beard in names])
    directions = fit_directions(
        targets.matrix(), targets.spec, dict(zip(ATTRIBUTES, labels.T, strict=True))
    )
    held_out = [world.identity("test", k) for k in range(NUM_IDENTITIES)]
    references = render([(p, view_of(100 + k)) for k, p in enumerate(held_out)])
    loras = hyper.generate(jax.random.key(0), references)
    shape = (NUM_IDENTITIES, *sd.unet.settings.sample_size, sd.unet.settings.in_channels)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    columns = {"reference": references}
    numbers: dict[str, Any] = {
        "caption": world.caption(view),
        "identities": NUM_IDENTITIES,
        "judge_accuracy": dict(zip(ATTRIBUTES, right.tolist(), strict=True)),
        "share_that_shows": {},
    }
    for name in ATTRIBUTES:
        shares = numbers["share_that_shows"][name] = {}
        for amount in AMOUNTS:
            edited = edit(loras, directions, {name: amount})[0]
            drawn = np.asarray(
                sd.sample(
                    jax.random.key(0), [world.caption(view)] * NUM_IDENTITIES, lora=edited,
                    num_steps=20, latents=noise,
                )
            )  # fmt: skip
            said = (judge(drawn) > 0).mean(axis=0)
            shares[f"{amount:g}"] = dict(zip(ATTRIBUTES, said.tolist(), strict=True))
            print(f"{name} {amount:+g}: {shares[f'{amount:g}']}", flush=True)
            if amount == 0.0:
                columns["generated LoRA"] = drawn
            elif abs(amount) == 1.0:
                columns[f"{name} {amount:+.0f}"] = drawn
    first = {name: columns.pop(name) for name in ("reference", "generated LoRA")}
    return numbers, {**first, **columns}


def main() -> int:
    """Exit code 0, or 2 with one line."""
    from hyperlora_jax.errors import UserError
    from hyperlora_jax.evaluate.report.figures import draw_grid, to_png

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", required=True, help="LoRA-target dataset of avatars")
    parser.add_argument("--checkpoint", required=True, help="workdir of `hyperlora train`")
    parser.add_argument("--json", type=pathlib.Path, required=True)
    parser.add_argument("--picture", type=pathlib.Path, required=True)
    given = parser.parse_args()
    try:
        numbers, columns = measure(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.json.write_text(json.dumps(numbers, indent=1) + "\n")
    given.picture.write_bytes(to_png(draw_grid({n: list(c[:ROWS]) for n, c in columns.items()})))
    print(f"wrote {given.json} and {given.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
