"""Measures ways of drawing with LoRAs on held-out avatars, at each way's best strength.

    python tools/drawing.py regions  --workdir runs/drawing
    python tools/drawing.py branches --workdir runs/drawing --identities 48

regions   two people on a canvas of double width, each half judged by itself
branches  guidance with LoRAs on both branches or on the conditional one: identity against captions

Strengths are chosen on validation people. Drawn pictures are kept: the same command goes on where
it was stopped. Writes docs/measurements/drawing_NAME.json, which tools/make_results.py prints.
"""

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
STRENGTHS = (0.75, 1.0, 1.5, 2.0, 2.5)
GUIDED_STRENGTHS = (0.5, 1.0, 1.5)
GUIDANCES = (1.0, 2.0, 4.0, 7.5)
BATCH = 8  # people at a time
ROWS = 4  # of the picture
ALONE, EVERYWHERE = "each alone", "both LoRAs everywhere"
REGIONS, APART = "regions", "regions, apart"
WAYS = (ALONE, EVERYWHERE, REGIONS, APART)
BRANCHES = ("both", "conditional")
NONE = "no LoRA"
ABOUT = (
    "The base was trained with a tenth of its captions left out, and follows captions without "
    "guidance too; the LoRAs were trained under captions only."
)


class People:
    """Held-out people, their generated LoRAs, and pictures of them that are kept once drawn."""

    def __init__(self, given: argparse.Namespace, split: str, count: int):
        import jax

        from hyperlora_jax.evaluate.protocol import make_evaluation_set, training_ids
        from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
        from hyperlora_jax.stable_diffusion.embedded import load_base
        from hyperlora_jax.worlds.by_style import open_world

        self.sd, hyper = load_base(given.base), Hypernetwork.restore(given.checkpoint)
        world = open_world("pixel-art")
        self.workdir = pathlib.Path(given.workdir)
        self.asked = make_evaluation_set(
            world,
            split=split,
            num_identities=count,
            num_captions=given.captions,
            training_ids=training_ids(world, 0, len(hyper.facts["trained_on"])),
            cache_dir=self.workdir / "renders",
            progress=False,
        )
        self.count = self.asked.num_identities
        self.partner = np.roll(np.arange(self.count), 1)  # who is drawn on the right
        self.loras = hyper.generate(jax.random.key(0), self.asked.seen_references, strength=1.0)
        settings = self.sd.unet.settings
        self.noise = self.asked.noise((*settings.sample_size, settings.out_channels))
        self.key = [self.sd.base_hash, given.checkpoint, split, count, given.captions]

    def loras_of(self, who: np.ndarray, strength: float) -> Any:
        """LoRAs of these people."""
        from hyperlora_jax.lora import factors

        return factors.scale(factors.index(self.loras, who), strength)

    def prompts(self, who: np.ndarray) -> list[str]:
        """All captions of these people."""
        return [text for i in who for text in self.asked.captions[i]]

    def kept(self, name: str, draw: Callable[[np.ndarray], Any]) -> np.ndarray:
        """Pictures [i, c, h, w, 3] that `draw` makes of some people."""
        digest = hashlib.sha256(json.dumps([*self.key, name]).encode()).hexdigest()[:16]
        file = self.workdir / "drawn" / f"{digest}.npy"
        if file.exists():
            return np.load(file)
        parts = []
        for start in range(0, self.count, BATCH):
            who = np.minimum(np.arange(start, start + BATCH), self.count - 1)
            images = np.asarray(draw(who))
            parts.append(images.reshape(BATCH, -1, *images.shape[1:]))
        images = np.concatenate(parts)[: self.count]
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp.npy")
        np.save(temporary, images)
        temporary.replace(file)
        return images

    def draw_pairs(self, way: str, strength: float) -> np.ndarray:
        """Everybody beside their partner, each half from the noise that they have alone."""
        from hyperlora_jax.lora import factors
        from hyperlora_jax.stable_diffusion.picture_regions import Region

        def draw(who: np.ndarray) -> Any:
            both = [who, self.partner[who]]
            noise = [self.noise[k].reshape(-1, *self.noise.shape[2:]) for k in both]
            loras = [self.loras_of(k, strength) for k in both]
            if way == ALONE:
                return self.sd.sample(0, self.prompts(who), lora=loras[0], latents=noise[0])
            if way == EVERYWHERE:
                loras = [factors.concatenate_ranks(*loras)] * 2
            regions = [
                Region(place, lora, self.prompts(k))
                for place, lora, k in zip(("left", "right"), loras, both, strict=True)
            ]
            return self.sd.sample(
                0, self.prompts(who), regions=regions, apart=way == APART,
                latents=np.concatenate(noise, axis=2),
            )  # fmt: skip

        return self.kept(f"{way}, {strength:g}", draw)

    def halves(self, way: str, strength: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(who, who is beside, pictures of the first) of both halves; alone there is one."""
        images, everybody = self.draw_pairs(way, strength), np.arange(self.count)
        if way == ALONE:
            return [(everybody, self.partner, images)]
        width = images.shape[3] // 2
        return [
            (everybody, self.partner, images[..., :width, :]),
            (self.partner, everybody, images[..., width:, :]),
        ]

    def recognised(self, way: str, strength: float) -> dict[str, np.ndarray]:
        """Of every person, the share of pictures where the nearest of N exact drawings is
        theirs ("left" and "right" of another; alone once) and their neighbour's ("other")."""
        from hyperlora_jax.evaluate.protocol import unit_pixels

        halves = self.halves(way, strength)
        places = ("left", "right")[: len(halves)]
        found = {name: np.zeros(self.count) for name in (*places, "other")}
        for place, (who, beside, images) in zip(places, halves, strict=True):
            for i, j, drawn in zip(who, beside, images, strict=True):
                asked = self.asked.candidates[i]
                rest = asked[(asked != i) & (asked != j)]
                rows = np.concatenate([[i, j], rest[: len(asked) - 2]])
                exact = unit_pixels(self.asked.pool[rows][:, self.asked.caption_index[i]])
                error = np.square(np.clip(drawn, 0, 1)[None] - exact).mean((2, 3, 4))
                nearest = error.argmin(0)
                found[place][i] = (nearest == 0).mean()
                found["other"][i] += (nearest == 1).mean() / len(halves)
        return found

    def draw_guided(self, branches: str, guidance: float, strength: float) -> np.ndarray:
        """Everybody alone, with guidance, by their LoRAs or the base."""
        if branches == NONE:
            branches, strength = BRANCHES[0], 0.0
        branches = branches if guidance != 1.0 else BRANCHES[0]  # without guidance there is one
        return self.kept(
            f"{branches}, {guidance:g}, {strength:g}",
            lambda who: self.sd.sample(
                0,
                self.prompts(who),
                lora=self.loras_of(who, strength),
                latents=self.noise[who].reshape(-1, *self.noise.shape[2:]),
                guidance=guidance,
                lora_branches=branches,
            ),
        )


def best(scores: dict[float, float]) -> float:
    """The strength with the highest score, the lowest of equal ones."""
    return max(scores, key=lambda strength: (scores[strength], -strength))


def measure_regions(given: argparse.Namespace) -> dict[str, Any]:
    """The record of `regions`."""
    from hyperlora_jax.evaluate.metrics import clustered_mean, paired_difference, paired_ratio

    validation = People(given, "validation", given.validation)
    test = People(given, "test", given.identities)
    chosen, scores = {}, {}
    for way in WAYS:
        curve = {}
        for strength in STRENGTHS:
            seen = validation.recognised(way, strength)
            curve[strength] = np.mean([seen[name] for name in ("left", "right") if name in seen])
        chosen[way] = best(curve)
        scores[way] = test.recognised(way, chosen[way])
        print(way, chosen[way], {k: round(v.mean(), 3) for k, v in scores[way].items()}, flush=True)
    rows, differences = [], []
    for way, own in scores.items():
        alone = scores[ALONE]["left"]
        halves = [own["left"], own.get("right", own["left"])]
        cells = [clustered_mean(half) for half in halves]
        cells += [paired_ratio(half, alone) for half in halves]
        cells.append(clustered_mean(own["other"]))
        rows.append([way, *map(_pm, cells), f"{chosen[way]:g}"])
        if "right" in own:
            differences.append(f"{_pm(paired_difference(own['right'], own['left']))} ({way})")
    _picture(given.picture, test, chosen)
    return {
        "title": "Two people in one picture",
        "pictures": ["pictures/regions.png"],
        "columns": [
            "",
            "identity top-1, left",
            "right",
            "left, of alone",
            "right, of alone",
            "taken for the other",
            "strength",
        ],
        "rows": rows,
        "per_person": {way: {k: v.tolist() for k, v in own.items()} for way, own in scores.items()},
        "note": (
            f"{test.count} held-out people, each once left and once right of another, "
            f"{given.captions} captions each; every half is judged by itself, among 32 people of "
            "whom one is the neighbour. “Each alone” is a picture of single width from the same "
            "noise: what it shows of the neighbour is the control for leaks. Right minus left, the "
            f"same people: {', '.join(differences)}. The base was trained on one person a picture, "
            "where zeros beyond the edges tell it its place; apart, each half has those. Picture: "
            "each alone (two columns), then the three others; last, exact."
        ),
    }


def measure_branches(given: argparse.Namespace) -> dict[str, Any]:
    """The record of `branches`."""
    from hyperlora_jax.evaluate import metrics
    from hyperlora_jax.evaluate.judges.attribute_probe import AttributeProbe

    probe = AttributeProbe.load()
    validation = People(given, "validation", given.validation)
    test = People(given, "test", given.identities)

    def scores(people: People, *how: Any) -> tuple[np.ndarray, np.ndarray]:
        images, asked = people.draw_guided(*how), people.asked
        own = [
            metrics.nearest_candidates(images[i : i + 1], asked.candidate_renders(i)[None])[0][0]
            for i in range(people.count)
        ]
        seen = metrics.caption_accuracy(
            probe.classes(images), asked.caption_labels, metrics.is_finite(images)
        )
        return np.stack(own), seen.mean(-1)

    rows, per_person, grid = [], {}, {}
    for branches in (NONE, *BRANCHES):
        for guidance in GUIDANCES:
            curve = {
                s: [float(score.mean()) for score in scores(validation, branches, guidance, s)]
                for s in (GUIDED_STRENGTHS if branches != NONE else (0.0,))
            }
            grid[f"{branches}, {guidance:g}"] = curve
            strength = best({s: identity for s, (identity, _) in curve.items()})
            own, captions = scores(test, branches, guidance, strength)
            rows.append(
                [
                    branches,
                    f"{guidance:g}",
                    _pm(metrics.clustered_mean(own)),
                    _pm(metrics.clustered_mean(captions)),
                    f"{strength:g}" if strength else "–",
                ]
            )
            per_person[f"{branches}, {guidance:g}"] = {
                "identity": own.mean(1).tolist(), "captions": captions.mean(1).tolist(),
            }  # fmt: skip
            print(*rows[-1], flush=True)
    differences = [
        f"{_pm(metrics.paired_difference(*own))} at guidance {guidance:g}"
        for guidance in GUIDANCES[1:]
        for own in [[per_person[f"{name}, {guidance:g}"]["identity"] for name in BRANCHES[::-1]]]
    ]
    return {
        "title": "Guidance: LoRAs on both branches, or on the conditional one",
        "columns": ["LoRA on", "guidance", "identity top-1", "caption parts", "strength"],
        "rows": rows,
        "per_person": per_person,
        "validation": grid,  # [identity, captions] by strength
        "note": (
            f"{test.count} held-out people, {given.captions} captions each, 32 candidates; without "
            "guidance there is one branch. Identity, conditional minus both, the same people: "
            f"{', '.join(differences)}. {given.about}"
        ),
    }


def _pm(estimate: Any) -> str:
    return f"{estimate.mean:.3f} ± {estimate.stderr:.3f}"


def _picture(file: pathlib.Path, people: People, chosen: dict[str, float]) -> None:
    from PIL import Image

    drawn = {way: people.draw_pairs(way, chosen[way]) for way in WAYS}
    exact, partner = people.asked.exact, people.partner
    gap = np.ones((exact.shape[2], 2, 3), np.float32)
    lines = []
    for k in range(ROWS):
        shown = [drawn[ALONE][k, 0], drawn[ALONE][partner[k], 0]]
        shown += [drawn[way][k, 0] for way in WAYS[1:]]
        shown.append(np.concatenate([exact[k, 0], exact[partner[k], 0]], 1))
        lines += [np.concatenate([x for part in shown for x in (part, gap)][:-1], 1)]
    tall = np.concatenate([x for line in lines for x in (line, np.ones_like(line[:2]))][:-1])
    pixels = (np.clip(tall, 0, 1) * 255).astype(np.uint8).repeat(5, 0).repeat(5, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


MEASURES = {"regions": measure_regions, "branches": measure_branches}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(MEASURES))
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--base", default="tiny-sd")
    parser.add_argument("--checkpoint", default="avatar-hypernetwork")
    parser.add_argument("--identities", type=int, default=64)
    parser.add_argument("--validation", type=int, default=16)
    parser.add_argument("--captions", type=int, default=4)
    parser.add_argument("--variant", help="words after the title, of a record beside the first")
    parser.add_argument("--about", default=ABOUT, help="a sentence on the base, of branches")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "docs/pictures/regions.png")
    given = parser.parse_args(arguments)
    from hyperlora_jax.errors import UserError
    from hyperlora_jax.parallel import compilation_cache, cpu_devices

    compilation_cache.enable()
    cpu_devices.prepare()
    command = f"python tools/drawing.py {given.name} --workdir WORKDIR"
    for name in ("identities", "validation"):
        if getattr(given, name) != parser.get_default(name):
            command += f" --{name} {getattr(given, name)}"
    if given.base != parser.get_default("base"):
        command += " --base BASE"
    file = given.json or ROOT / f"docs/measurements/drawing_{given.name}.json"
    try:
        record = {"name": given.name, "command": command, **MEASURES[given.name](given)}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.variant:
        record["title"] += f", {given.variant}"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
