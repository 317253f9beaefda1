"""`hyperlora demo`: every stage on the embedded base and avatars, and proof by PyTorch.

render ─► distill ─► train ─► generate, compare ─► export ─► PyTorch diffusers ─► report

The proof: diffusers loads the exported files and draws from the same noise as JAX.
"""

import functools
import importlib.util
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from hyperlora_jax import demo_screen, storage
from hyperlora_jax.array_types import Json
from hyperlora_jax.demo_screen import Stage
from hyperlora_jax.distill.distillation import distill
from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.evaluation import Evaluation
from hyperlora_jax.evaluate.methods import title
from hyperlora_jax.generate import generate_one
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.lora_files.verify import load_modules, verify
from hyperlora_jax.pictures.pictures import encode_png
from hyperlora_jax.shipped import base_path
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.train.hypernetwork.hypernet_training import train_hypernetwork
from hyperlora_jax.train.loop import open_workdir


def compare_with_torch(
    sd: StableDiffusion,
    base: str,
    files: Sequence[Path],
    prompts: Sequence[str],
    *,
    num_steps: int = 20,
) -> Json:
    """Draws one picture per (file, prompt) with both frameworks from the same noise.

    Args:
        sd: the base in JAX; `base`: where PyTorch reads it.

    Returns:
        "max_abs_diff": largest difference of a pixel in [0, 1], JAX against PyTorch, float32;
        "output_change": mean difference that the LoRA makes to PyTorch's own pictures;
        "missing_keys", "unexpected_keys": how many over all "files".

    Raises:
        UserError: PyTorch, diffusers or peft is not installed.
    """
    settings = sd.unet.settings
    random = np.random.default_rng(0)
    shape = (len(files), *settings.sample_size, settings.in_channels)
    noise = random.standard_normal(shape).astype(np.float32)
    jax_images = []
    for k, path in enumerate(files):
        lora, _ = load_lora(path, sd)
        batched = jax.tree.map(lambda leaf: leaf[None], lora)
        image = sd.sample(
            jax.random.key(0),
            [prompts[k]],
            lora=batched,
            num_steps=num_steps,
            guidance=1.0,
            latents=noise[k, None],
        )
        jax_images.append(np.asarray(image)[0])
    with_lora, without = _torch_images(base_path(base), files, prompts, noise, num_steps)
    modules = load_modules(base_path(base))
    checks = [verify(path, modules) for path in files]
    return {
        "max_abs_diff": float(np.abs(np.stack(jax_images) - with_lora).max()),
        "output_change": float(np.abs(with_lora - without).mean()),
        "missing_keys": sum(len(check.missing_keys) for check in checks),
        "unexpected_keys": sum(len(check.unexpected_keys) for check in checks),
        "files": len(files),
    }


def _torch_images(
    base: str, files: Sequence[Path], prompts: Sequence[str], noise: np.ndarray, num_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures with and without the LoRA, by StableDiffusionPipeline.load_lora_weights."""
    try:
        import torch
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise UserError(
            f"PyTorch comparison: {error.name} is not installed, "
            "expected the extra `pip install hyperlora-jax[torch]`"
        ) from error
    pipe = StableDiffusionPipeline.from_pretrained(
        base, safety_checker=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(k: int) -> np.ndarray:
        latents = torch.from_numpy(np.ascontiguousarray(noise[k, None].transpose(0, 3, 1, 2)))
        result = pipe(
            prompts[k],
            latents=latents,
            num_inference_steps=num_steps,
            guidance_scale=1.0,
            output_type="np",
        )
        return result.images[0]  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    without = [draw(k) for k in range(len(files))]
    with_lora = []
    for k, path in enumerate(files):
        name = f"lora_{k}"
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        with_lora.append(draw(k))
        pipe.unload_lora_weights()
    return np.stack(with_lora), np.stack(without)


NUM_FILES = 4
LOG = "demo.log"
PROMPT = "smiling mouth wide eyes no glasses blue striped clothes yellow background"
STAGES = {
    "distill": Stage(
        "Train LoRAs the usual way, as examples",
        45.0,
        (("drawing", 0.0, 0.05), ("distill", 0.05, 1.0)),
    ),
    "train": Stage(
        "Train the hypernetwork: picture in, LoRA out",
        180.0,
        (
            ("drawing", 0.0, 0.04),
            ("conditions", 0.04, 0.05),
            ("latents", 0.05, 0.06),
            ("texts", 0.06, 0.07),
            ("hypernetwork", 0.07, 1.0),
        ),
    ),
    "evaluate": Stage(
        "Try it on people it has never seen",
        145.0,
        (
            ("drawing", 0.0, 0.01),
            ("encoding", 0.01, 0.02),
            ("conventional LoRAs", 0.2, 0.55),
            ("evaluating base", 0.55, 0.55),
            ("evaluating mean_lora", 0.6, 0.6),
            ("evaluating shuffled", 0.7, 0.7),
            ("evaluating nearest", 0.8, 0.8),
            ("evaluating conventional", 0.9, 0.9),
        ),
    ),
    "export": Stage("Write LoRA files", 3.0),
    "torch": Stage("Load them with PyTorch diffusers", 12.0),
    "speed": Stage("Measure speed", 30.0),
    "report": Stage("Write the report", 20.0),
}
SHOWN = ("exact", "generated", "conventional", "nearest", "mean_lora", "shuffled", "base")


def demo(config: ConfigDict, workdir: str | Path, console: Console | None = None) -> Json:
    """Runs the pipeline in WORKDIR/run; writes report.html, grid.png, metrics.json and loras/.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: PyTorch is not installed, an unusable workdir.
    """
    out = Path(open_workdir(storage.local(workdir, "demo")))
    run = out / "run"
    _check_torch()
    shown = console or Console()
    minutes = sum(stage.seconds for stage in STAGES.values()) / 60
    shown.print(
        f"About {minutes:.0f} minutes on two cores. What libraries say goes to {out / LOG}."
    )
    began = time.perf_counter()
    with demo_screen.opened(out / LOG, console) as screen:
        with screen.stage("distill", STAGES["distill"]):
            distill(config, run)
        with screen.stage("train", STAGES["train"]):
            train_hypernetwork(config, run)
        with screen.stage("evaluate", STAGES["evaluate"]):
            evaluation = Evaluation(config, run)
            results = evaluation.run(functools.partial(print, flush=True))
        with screen.stage("export", STAGES["export"]):
            files = write_loras(evaluation, out / "loras")
        with screen.stage("torch", STAGES["torch"]):
            prompts = [evaluation.test.captions[i][0] for i in range(len(files))]
            steps = config.evaluate.num_sampling_steps
            parity = compare_with_torch(evaluation.sd, config.base, files, prompts, num_steps=steps)
        with screen.stage("speed", STAGES["speed"]):
            evaluation.measure_speed()
        with screen.stage("report", STAGES["report"]):
            metrics, written = evaluation.report(
                results,
                out,
                torch_parity=parity,
                seconds={**screen.seconds, "total": time.perf_counter() - began},
                page_name="report.html",
                title="A LoRA from one picture",
            )
    shown.print(summary_table(metrics))
    shown.print(_verdict(metrics))
    shown.print(_next(out, written.page, config.base), soft_wrap=True, highlight=False)
    return metrics


def _next(out: Path, page: Path, base: str) -> str:
    """Where to look first, and three commands that work as they stand here."""
    program = "hyperlora" if shutil.which("hyperlora") else shlex.join([sys.argv[0]])
    if program.endswith(".py"):
        program = f"{sys.executable} -m hyperlora_jax"
    place, base = shlex.quote(str(out)), shlex.quote(base)
    reference, file = f"{place}/loras/00.reference.png", f"{place}/mine.safetensors"
    return f"""
[bold]Look first at[/bold] {page}
  four people it has never seen, as LoRAs for other programs: {out / "loras"}
  what other libraries said: {out / LOG}

[bold]Then try[/bold]
  {program} serve {place}
      your own picture, in the browser
  {program} generate --checkpoint {place} --reference {reference} --out {file}
      a LoRA from one picture
  {program} sample {base} --prompt "{PROMPT}" --lora {file} --out {place}/pictures
      pictures with it, large in contact_sheet.png"""


def write_loras(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Reference pictures and generated files of the first test identities.

    `NN.safetensors` is in the portable kohya form, `NN.diffusers.safetensors` in diffusers'. They
    are made from the picture files by the same code as `hyperlora generate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(min(NUM_FILES, evaluation.test.num_identities)):
        reference = folder / f"{k:02d}.reference.png"
        reference.write_bytes(encode_png(evaluation.test.views[k][0]))
        for form, suffix in (("kohya", ""), ("diffusers", ".diffusers")):
            path = folder / f"{k:02d}{suffix}.safetensors"
            written = generate_one(evaluation.hyper, [reference], path, format=form)
            files += [file.path for file in written]
    return files


def summary_table(metrics: Json) -> Table:
    """One row per method: identity, error, captions."""
    table = Table(title="Held-out identities, unseen captions")
    for heading in ("method", "identity top-1", "error to exact", "caption", "strength"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name in (*SHOWN, "copy_reference"):
        if name not in metrics["identity_top1"]:
            continue
        cells = [metrics[key][name] for key in ("identity_top1", "image_error", "caption_accuracy")]
        digits = (3, 4, 3)
        text = [
            f"{cell['mean']:.{d}f} ± {cell['stderr']:.{d}f}"
            for cell, d in zip(cells, digits, strict=True)
        ]
        table.add_row(title(name), *text, f"{metrics['strength'][name]['best']:g}")
    return table


def _verdict(metrics: Json) -> str:
    paired, seconds = metrics["paired"], metrics["seconds"]
    parity = metrics["torch_parity"]
    speed = seconds["fit_one_lora"] / seconds["generate_one_lora"]
    return (
        f"generated / conventional identity: {paired['ratio']:.2f} ± {paired['ratio_stderr']:.2f}\n"
        f"one LoRA: {1e3 * seconds['generate_one_lora']:.2f} ms generated (batch of 64), "
        f"{seconds['fit_one_lora']:.1f} s fitted alone: {speed:,.0f}× faster\n"
        f"PyTorch against JAX: largest pixel difference {parity['max_abs_diff']:.1e}, "
        f"{parity['missing_keys']} missing and {parity['unexpected_keys']} unexpected keys\n"
        f"total {seconds['total'] / 60:.1f} minutes"
    )


def _check_torch() -> None:
    from hyperlora_jax.errors import UserError

    for name in ("torch", "diffusers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"demo: {name} is not installed; it proves that PyTorch loads what we write: "
                "pip install hyperlora-jax[torch,avatars]"
            )
