"""`hyperlora demo`: every stage on the embedded base and avatars, and proof by PyTorch.

render ─► distill ─► train ─► generate, compare ─► export ─► PyTorch diffusers ─► report
"""

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hyperlora_jax import storage
from hyperlora_jax.data.pictures import encode_png
from hyperlora_jax.distill.run import distill
from hyperlora_jax.evaluate.method_names import TITLES
from hyperlora_jax.evaluate.run import Evaluation
from hyperlora_jax.evaluate.torch_parity import TorchParity, compare_with_torch
from hyperlora_jax.generate import generate_one
from hyperlora_jax.train.hypernet_training import train_hypernetwork
from hyperlora_jax.train.loop import open_workdir

NUM_FILES = 4
SHOWN = ("exact", "generated", "conventional", "nearest", "mean_lora", "shuffled", "base")


def demo(config: Any, workdir: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Runs the pipeline in WORKDIR/run; writes report.html, grid.png, metrics.json and loras/.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: PyTorch is not installed, an unusable workdir.
    """
    console = console or Console()
    out = Path(open_workdir(storage.local(workdir, "demo")))
    run, seconds = out / "run", {}
    _check_torch()

    def stage(name: str, title: str, function: Any) -> Any:
        console.rule(f"[bold]{title}")
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        return result

    began = time.perf_counter()
    concepts = config.distill.num_concepts
    stage("distill", f"Distil: {concepts} LoRAs at once", lambda: distill(config, run))
    stage("train", "Train the hypernetwork", lambda: train_hypernetwork(config, run))

    def compare_all() -> tuple[Evaluation, dict[str, Any]]:
        evaluation = Evaluation(config, run)
        return evaluation, evaluation.run(lambda line: console.print(f"[dim]{line}"))

    evaluation, results = stage("evaluate", "Compare on held-out identities", compare_all)
    files = stage("export", "Write LoRA files", lambda: write_loras(evaluation, out / "loras"))
    parity: TorchParity = stage(
        "torch",
        "Load them with PyTorch diffusers",
        lambda: compare_with_torch(
            evaluation.sd,
            config.base,
            files,
            [evaluation.test.captions[i][0] for i in range(len(files))],
            num_steps=config.evaluate.num_sampling_steps,
        ),
    )
    stage("speed", "Measure speed", evaluation.measure_speed)
    seconds["total"] = time.perf_counter() - began
    metrics, written = evaluation.report(
        results,
        out,
        torch_parity=parity.to_json(),
        seconds=seconds,
        page_name="report.html",
        title="A LoRA from one picture",
    )
    console.print(summary_table(metrics))
    console.print(_verdict(metrics))
    console.print(f"report: {written.page}\nLoRAs:  {out / 'loras'}")
    return metrics


def write_loras(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Reference pictures and generated files of the first test identities.

    `NN.safetensors` is in the portable kohya form, `NN.diffusers.safetensors` in diffusers'. They
    are made from the picture files by the same code as `hyperlora generate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k in range(min(NUM_FILES, evaluation.test.num_identities)):
        reference = folder / f"{k:02d}.reference.png"
        reference.write_bytes(encode_png(evaluation.test.views[k, 0]))
        for form, suffix in (("kohya", ""), ("diffusers", ".diffusers")):
            path = folder / f"{k:02d}{suffix}.safetensors"
            written = generate_one(evaluation.hyper, [reference], path, format=form)
            files += [file.path for file in written]
    return files


def summary_table(metrics: Mapping[str, Any]) -> Table:
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
        table.add_row(TITLES.get(name, name), *text, f"{metrics['strength'][name]['best']:g}")
    return table


def _verdict(metrics: Mapping[str, Any]) -> str:
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
