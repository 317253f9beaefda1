"""How fast a hypernetwork writes LoRAs and trains, against the conventional fit of one LoRA.

    python tools/bench.py hypernet --json docs/measurements/hypernet_cpu.json
    python tools/bench.py hypernet --device gpu --json docs/measurements/hypernet_gpu.json

The avatars' hypernetwork on the embedded base (q, k, v, out at rank 4), untrained: speed does not
depend on what the numbers are. `generate` is from pictures to factors on the device; `to files`
adds the copy to the host and one file per LoRA with fsync; the peer is the conventional fit of the
same LoRA on the same machine (200 steps of 8 pictures), alone. w2w is the layout of
weights2weights: 64 layers of Stable Diffusion 1.5 at rank 1, 128 tokens, 99,648 numbers.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_export import attention_spec

from hyperlora_jax.array_types import Params
from hyperlora_jax.cli.config import load_config
from hyperlora_jax.distill import slots as slot_state
from hyperlora_jax.distill.distillation import make_recipe
from hyperlora_jax.encoders.named_encoders import configured_encoder
from hyperlora_jax.hypernet.building import architecture, build_generator
from hyperlora_jax.hypernet.condition import Condition
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.lora_files.writing import FORMATS
from hyperlora_jax.stable_diffusion.denoising_loss import Denoiser
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.train.hypernetwork.hypernet_task import hypernet_task
from hyperlora_jax.train.hypernetwork.hypernet_training import make_phases
from hyperlora_jax.train.optimizer import make_optimizer
from hyperlora_jax.train.state import state_builder
from hyperlora_jax.train.step import train_step

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 8, 64)
RUNS = 5
LEAST_SECONDS = 1.0  # of a measurement
FITTED_STEPS = 40  # of the conventional fit are timed, and scaled to all


def run(device: str = "cpu", runs: int = RUNS) -> list[dict]:
    """All rows."""
    config = load_config(ROOT / "configs" / "avatars.py")
    sd = load_base(config.base)
    encoder = configured_encoder(config.model)
    spec = sd.lora_spec(config.model.preset, config.model.rank)
    tiny = _untrained(spec, architecture(config.model), encoder)
    w2w_model = {
        "generator": "regression",
        "network": {"width": 256, "depth": 4, "num_heads": 4, "scan": True},
    }
    w2w = _untrained(attention_spec(("to_q", "to_v"), 1), w2w_model, encoder)
    fit_seconds = _seconds_per_fit(config, sd, spec, runs)
    rows = []
    for name, hyper in (("avatars", tiny), ("w2w", w2w)):
        for batch in BATCHES:
            seconds = _times(lambda h=hyper, b=batch: _generate(h, b), runs)
            rate = batch / statistics.median(seconds)
            peer = 1.0 / fit_seconds if name == "avatars" else None
            title = f"generate {name}, batch {batch}"
            rows.append(_row(title, rate, peer, "LoRAs/s", len(seconds)))
        for format in FORMATS:
            if format == "weights2weights" and name != "w2w":
                continue
            rate = _file_rate(hyper, format, runs)
            rows.append(_row(f"to files {name} {format}, batch 64", rate, None, "LoRAs/s", runs))
    for objectives in ({"end_to_end": 1.0}, {"delta": 1.0, "whitened": 1.0}):
        rate = _training_rate(config, sd, tiny, objectives, runs)
        title = " + ".join(objectives)
        rows.append(_row(f"train {title}, batch 16", rate, None, "steps/s", runs))
    return rows


def _untrained(spec: LoraSpec, model: dict[str, Any], encoder: Any) -> Hypernetwork:
    generator = build_generator(spec, model)
    pooled, tokens = encoder.encode(jnp.zeros((1, *_picture(encoder))))
    params = jax.jit(generator.init)(jax.random.key(0), Condition(pooled, tokens))
    return Hypernetwork(generator, params, encoder, {"family": "sd1"}, model)


def _picture(encoder: Any) -> tuple[int, int, int]:
    side = encoder.module.image_size
    return side, side, 3


def _generate(hyper: Hypernetwork, batch: int) -> Params:
    pictures = np.zeros((batch, *_picture(hyper.encoder)), np.float32)
    return jax.block_until_ready(hyper.generate(jax.random.key(0), pictures))


def _file_rate(hyper: Hypernetwork, format: str, runs: int, batch: int = 64) -> float:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:

        def once() -> None:
            loras = jax.device_get(_generate(hyper, batch))
            for k in range(batch):
                path = Path(folder) / f"{k}.safetensors"
                if format in ("peft", "weights2weights"):
                    path = Path(folder) / str(k)
                save_lora(path, factors.index(loras, k), hyper.spec, format, family="sd1")

        return batch / statistics.median(_times(once, runs))


def _seconds_per_fit(config: Any, sd: Any, spec: LoraSpec, runs: int) -> float:
    recipe = make_recipe(config.distill, images_per_step=8)
    trained = recipe.factors(spec)
    latents = np.zeros((8, *sd.unet.settings.sample_size, sd.unet.settings.in_channels), np.float32)
    text = {"states": np.asarray(sd.encode_prompt(["a person"] * 8), np.float32)}
    slots = slot_state.empty_slots(trained, recipe, 1, (latents, text), 8)
    slots = slot_state.load_slot(
        slots, np.int32(0), slot_state.concept_key(0, 0), (latents, text), np.int32(8),
        parametrisation=trained, recipe=recipe,
    )  # fmt: skip
    state = SimpleNamespace(slots=slots)

    def once() -> None:
        state.slots, losses = slot_state.advance(
            state.slots, sd.params["unet"], recipe=recipe, parametrisation=trained,
            denoiser=Denoiser(sd.unet, sd.schedule, recipe.min_snr_gamma),
            num_steps=FITTED_STEPS,
        )  # fmt: skip
        jax.block_until_ready(losses)

    return statistics.median(_times(once, min(runs, 3))) * recipe.num_steps / FITTED_STEPS


def _training_rate(
    config: Any, sd: Any, hyper: Hypernetwork, objectives: dict[str, float], runs: int
) -> float:
    section = config.train.copy_and_resolve_references()
    section.objectives = objectives
    size, images = int(section.batch_size), int(section.images_per_subject)
    pooled, tokens = hyper.encoder.encode(jnp.zeros((1, *_picture(hyper.encoder))))
    text = np.asarray(sd.encode_prompt(["a person"]), np.float32)
    spec = hyper.spec
    frozen = {
        "unet": sd.params["unet"],
        "constants": {
            "mean": np.zeros(spec.num_parameters, np.float32),
            "std": np.ones(2 * len(spec), np.float32),
        },
    }
    shapes = tuple(pooled.shape[1:]), tuple(tokens.shape[1:])
    task = hypernet_task(
        hyper.generator, frozen, None, phases=make_phases(section), condition_shapes=shapes,
        base=Denoiser(sd.unet, sd.schedule),
    )  # fmt: skip
    latent = (*sd.unet.settings.sample_size, sd.unet.settings.in_channels)
    batch = {
        "pooled": np.zeros((size, 1, *shapes[0]), np.float32),
        "tokens": np.zeros((size, 1, *shapes[1]), np.float32),
        "latents": np.zeros((size, images, *latent), np.float32),
        "text": {"states": np.broadcast_to(text, (size, images, *text.shape[1:]))},
        "target": np.zeros((size, spec.num_parameters), np.float32),
        "step": np.zeros(size, np.int32),
    }
    transform, rate = make_optimizer(num_steps=1000, **dict(section.optimizer))
    key = jax.random.key(0)
    state = SimpleNamespace(now=jax.jit(state_builder(task.init, transform, True))(key))
    step = jax.jit(
        lambda state, frozen, batch: train_step(
            state, frozen, batch, key, loss=task.loss, optimizer=transform, rate=rate,
            ema_decay=0.998,
        ),
        donate_argnums=0,
    )  # fmt: skip
    placed = jax.device_put((frozen, batch))

    def once() -> None:
        for _ in range(5):
            state.now, metrics = step(state.now, *placed)
        jax.block_until_ready(metrics)

    return 5 / statistics.median(_times(once, runs))


def _times(function: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of every run: `runs` of them, and as many more as fit into `LEAST_SECONDS`, since the
    median of a few calls of milliseconds is chance. A first one compiles and is not counted."""
    function()
    seconds: list[float] = []
    while len(seconds) < runs or sum(seconds) < LEAST_SECONDS:
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def _row(workload: str, ours: float, peer: float | None, unit: str, runs: int) -> dict:
    kind = jax.devices()[0].device_kind
    return {
        "workload": workload,
        "ours": ours,
        "peer": peer,
        "unit": unit,
        "ratio": None if peer is None else ours / peer,
        "runs": runs,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {kind}",
    }
