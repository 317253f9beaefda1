"""How many LoRAs an hour, against the usual way: diffusers and PEFT, one LoRA after another.

    python tools/bench.py distill --json docs/measurements/distill_cpu.json

Workload distill/avatars/cpu: the embedded tiny base, q, k, v, out at rank 4, the recipe of
configs/avatars.py (200 steps of 4 of an identity's 8 pictures, AdamW, clipped gradients). Both
sides get latents and text states that are computed already, the same pictures, and all cores; the
peer takes one thread instead where that makes it faster (so small a model rarely gains by two). A
round is one wave of our slots, hand-over and folding included, then the peer on the first few of
the same identities; the ratio is the median of the rounds' ratios. The LoRAs of both are then
sampled on held-out captions and scored against the exact pictures (identity top-1 of 32).
"""

import importlib.util
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from hyperlora_jax.array_types import Params
from hyperlora_jax.distill.distillation import make_recipe
from hyperlora_jax.distill.fit import Base, Concepts, Plan, fit_loras
from hyperlora_jax.distill.slots import Recipe
from hyperlora_jax.evaluate import metrics
from hyperlora_jax.evaluate.methods import sample_images
from hyperlora_jax.evaluate.protocol import EvaluationSet, make_evaluation_set
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec, tree_from_sites
from hyperlora_jax.parallel import cpu_devices
from hyperlora_jax.parallel.mesh import make_mesh
from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.subjects.encoded_subjects import EncodedSubjects, encode_subjects
from hyperlora_jax.worlds.avatars import Avatars

CONFIG = Path(__file__).parents[1] / "configs" / "avatars.py"
ROUNDS = 4
PEER_PER_ROUND = 3
TRIED_STEPS = 40  # to choose the number of threads


def run(device: str = "cpu", rounds: int = ROUNDS, slots: int | None = None) -> list[dict]:
    """The speed's row and the quality's rows."""
    cpu_devices.prepare()
    config = _config()
    section = config.distill
    mesh = make_mesh(**config.mesh)
    slots = int(slots or section.num_slots)
    sd = load_base(config.base)
    spec, recipe = sd.lora_spec(section.preset, section.rank), make_recipe(section)
    questions = make_evaluation_set(
        Avatars(config.data.style, config.data.size, config.data.split_seed),
        num_identities=rounds * slots,
        num_views=config.data.num_views,
        num_captions=config.evaluate.num_captions,
        num_candidates=config.evaluate.num_candidates,
    )
    encoded = encode_subjects(
        sd, [p.id for p in questions.identities], questions.views, questions.view_captions
    )
    peer = Peer(spec, recipe)
    ours(sd, spec, recipe, encoded, range(slots), slots, mesh)
    threads = peer.choose_threads(*encoded.concept(0))
    rates, fitted, rival = [], {}, {}
    for k in range(rounds):
        numbers = range(k * slots, (k + 1) * slots)
        start = time.perf_counter()
        fitted |= ours(sd, spec, recipe, encoded, numbers, slots, mesh)
        between = time.perf_counter()
        for number in numbers[:PEER_PER_ROUND]:
            rival[number] = peer.fit(*encoded.concept(number))
        rates.append(
            (3600 * slots / (between - start),
             3600 * PEER_PER_ROUND / (time.perf_counter() - between))
        )  # fmt: skip
        print(f"round {k}: {rates[-1][0]:.0f} and {rates[-1][1]:.0f} LoRAs/h", file=sys.stderr)
    machine = f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, {device}"
    speed = {
        "workload": f"distill/avatars/{device}",
        "ours": round(statistics.median(a for a, _ in rates), 1),
        "peer": round(statistics.median(b for _, b in rates), 1),
        "unit": "LoRAs/h",
        "ratio": round(statistics.median(a / b for a, b in rates), 2),
        "runs": rounds,
        "machine": machine,
        "slots": slots,
        "peer_threads": threads,
        "rounds": [[round(a, 1), round(b, 1)] for a, b in rates],
    }
    same = sorted(rival)
    quality = _quality(sd, questions, same, [fitted[i] for i in same], [rival[i] for i in same])
    return [speed, *({**row, "runs": rounds, "machine": machine} for row in quality)]


def ours(
    sd: Any,
    spec: LoraSpec,
    recipe: Recipe,
    encoded: EncodedSubjects,
    numbers: range,
    slots: int,
    mesh: Mesh,
) -> dict[int, Params]:
    """LoRAs by number."""
    fitting = fit_loras(
        Base(sd.unet.clone(mesh=mesh), sd.params["unet"], sd.schedule),
        recipe.factors(spec),
        recipe,
        Concepts(numbers, encoded.concept),
        Plan(slots, steps_per_call=25, progress=None, mesh=mesh if mesh.size > 1 else None),
    )
    return {done.index: done.lora for done in fitting}


class Peer:
    """The loop of diffusers' LoRA training scripts, without their accelerate wrapper."""

    def __init__(self, spec: LoraSpec, recipe: Recipe):
        from diffusers import DDPMScheduler, UNet2DConditionModel

        base = Path(base_path("tiny-sd"))
        self.spec, self.recipe = spec, recipe
        self.unet = UNet2DConditionModel.from_pretrained(base / "unet").float()
        self.unet.requires_grad_(False).train()
        self.noising = DDPMScheduler.from_pretrained(base / "scheduler")

    def choose_threads(self, latents: np.ndarray, text: Params) -> int:
        """Sets and returns the number of threads, one or all cores, that makes steps faster."""
        import torch

        seconds = {}
        for threads in (1, len(os.sched_getaffinity(0))):
            torch.set_num_threads(threads)
            self.fit(latents, text, num_steps=5)
            start = time.perf_counter()
            self.fit(latents, text, num_steps=TRIED_STEPS)
            seconds[threads] = time.perf_counter() - start
        best = min(seconds, key=lambda threads: seconds[threads])
        torch.set_num_threads(best)
        return best

    def fit(self, latents: np.ndarray, text: Params, num_steps: int | None = None) -> Params:
        """One LoRA, from scratch."""
        import torch
        from peft import LoraConfig

        rank, recipe = self.spec.max_rank, self.recipe
        self.unet.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, target_modules=[site.path for site in self.spec.sites]
            ),
            "one",
        )
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, recipe.learning_rate, (recipe.b1, recipe.b2), weight_decay=recipe.weight_decay
        )
        images = torch.from_numpy(np.array(latents)).permute(0, 3, 1, 2).contiguous()
        states = torch.from_numpy(np.array(text["states"]))
        for _ in range(num_steps or recipe.num_steps):
            chosen = torch.randperm(len(images))[: recipe.images_per_step]
            x, noise = images[chosen], torch.randn(images[chosen].shape)
            t = torch.randint(0, self.noising.config.num_train_timesteps, (len(x),))
            noisy = self.noising.add_noise(x, noise, t)
            found = self.unet(noisy, t, states[chosen], return_dict=False)[0]
            wanted = self.noising.get_velocity(x, noise, t)
            torch.nn.functional.mse_loss(found, wanted).backward()
            if recipe.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        layers = dict(self.unet.named_modules())
        pairs = {}
        for site in self.spec.sites:
            sides = layers[site.path].lora_A["one"].weight, layers[site.path].lora_B["one"].weight
            down, up = (side.detach().numpy().T.copy() for side in sides)
            pairs[site.path] = {"down": down, "up": up}
        self.unet.delete_adapters("one")
        return tree_from_sites(pairs)


def _quality(
    sd: Any, questions: EvaluationSet, numbers: list[int], first: list, second: list
) -> list[dict]:
    """Identity top-1 and image error of both, and their paired difference."""
    chosen = questions.select(numbers)
    scores = []
    for loras in (first, second):
        images = sample_images(sd, chosen, factors.stack(loras), 1.0, num_steps=20, guidance=1.0)
        candidates = np.stack([chosen.candidate_renders(i) for i in range(len(numbers))])
        scores.append(
            (
                metrics.nearest_candidates(images, candidates)[0],
                metrics.image_error(images, chosen.exact),
            )
        )
    rows = []
    for name, a, b in zip(("identity top-1", "image error"), *scores, strict=True):
        difference = metrics.paired_difference(a, b)
        rows.append(
            {
                "workload": f"distill/avatars {name}, {len(numbers)} identities",
                "ours": round(metrics.clustered_mean(a).mean, 4),
                "peer": round(metrics.clustered_mean(b).mean, 4),
                "unit": "share" if "top" in name else "squared",
                "ratio": None,
                "difference": round(difference.mean, 4),
                "stderr_of_difference": round(difference.stderr, 4),
                "stderr": [round(metrics.clustered_mean(x).stderr, 4) for x in (a, b)],
            }
        )
    return rows


def _config() -> Any:
    spec = importlib.util.spec_from_file_location("avatars", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
