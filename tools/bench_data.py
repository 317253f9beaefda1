"""How fast LoRA-target datasets are written, read and turned, against the usual ways in PyTorch.

    python tools/bench.py data --json docs/measurements/data_cpu.json

weights2weights-size LoRAs (99,648 numbers, 64 layers, rank 1), everything on the local disk, page
cache warm, ours and the peer measured in turns; the ratio is the median of the paired ratios.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hyperlora_jax.array_types import Array, Params
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors

NUM_LORAS = 512
BATCH = 32
RUNS = 5
GAUGE_BATCH = 16


def run(
    device: str = "cpu",
    num_loras: int = NUM_LORAS,
    runs: int = RUNS,
    against: str | Path | None = None,
) -> list[dict]:
    """All rows. Data work happens on the host whatever the device is.

    Args:
        against: another checkout, whose training input is measured beside ours.
    """
    del device
    import bench_training_input
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spec = w2w_spec()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        vectors = np.random.default_rng(0).normal(size=(num_loras, spec.num_parameters))
        vectors = vectors.astype(np.float32) * 0.01
        place = Path(folder)
        rows.append(_writing(place, spec, vectors, runs))
        rows += _reading(place, spec, vectors, runs)
        rows += _gauge(spec, vectors, runs)
    return rows + bench_training_input.run(against)


def w2w_spec() -> LoraSpec:
    """q and v of every attention layer of SD 1.5's UNet at rank 1."""
    sites = []

    def block(path: str, width: int) -> None:
        for kind in ("attn1", "attn2"):
            for projection in ("to_q", "to_v"):
                inputs = 768 if (kind, projection) == ("attn2", "to_v") else width
                name = f"{path}.transformer_blocks.0.{kind}.{projection}"
                sites.append(LoraSite(name, inputs, width, 1))

    for level, width in enumerate((320, 640, 1280)):
        for k in range(2):
            block(f"down_blocks.{level}.attentions.{k}", width)
        for k in range(3):
            block(f"up_blocks.{3 - level}.attentions.{k}", width)
    block("mid_block.attentions.0", 1280)
    return LoraSpec(tuple(sites))


def _compare(
    workload: str, ours: Callable[[], float], peer: Callable[[], float], unit: str, runs: int
) -> dict:
    """One row; both functions return a speed (more is better) and are called in turns."""
    ours()
    peer()
    pairs = [(ours(), peer()) for _ in range(runs)]
    return {
        "workload": workload,
        "ours": round(statistics.median(a for a, _ in pairs), 1),
        "peer": round(statistics.median(b for _, b in pairs), 1),
        "unit": unit,
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        "runs": runs,
        "machine": f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, cpu",
    }


def _rate(batches: Iterator, count: int, size: int) -> float:
    """LoRAs per second over `count` batches, after one to start the workers."""
    next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * size / (time.perf_counter() - start)


def _writing(place: Path, spec: LoraSpec, vectors: np.ndarray, runs: int) -> dict:
    """Ours against TFDS' own builder with the same features."""
    import shutil

    from hyperlora_jax.pictures.subjects import Subject
    from hyperlora_jax.targets.lora_targets_writer import write_lora_targets

    def ours() -> float:
        subjects = (Subject(f"{k:05d}", f"{k}", lora=v, split="train") for k, v in
                    enumerate(vectors))  # fmt: skip
        start = time.perf_counter()
        write_lora_targets(place / "ours", subjects, spec, "", overwrite=True)
        return len(vectors) / (time.perf_counter() - start)

    builder_class = _tfds_builder(vectors)

    def peer() -> float:
        shutil.rmtree(place / "tfds", ignore_errors=True)
        builder = builder_class(data_dir=str(place / "tfds"), file_format="array_record")
        start = time.perf_counter()
        builder.download_and_prepare()
        return len(vectors) / (time.perf_counter() - start)

    return _compare("data/write/w2w against a TFDS builder", ours, peer, "LoRAs/s", runs)


def _tfds_builder(vectors: np.ndarray):
    import tensorflow_datasets as tfds

    class Peer(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            lora = tfds.features.Tensor(shape=vectors.shape[1:], dtype=np.float32, encoding="bytes")
            features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "lora": lora})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k, vector in enumerate(vectors):
                yield k, {"id": str(k), "lora": vector}

    return Peer


def _reading(place: Path, spec: LoraSpec, vectors: np.ndarray, runs: int) -> list[dict]:
    """Shuffled batches of float32 vectors, ours from the dataset `_writing` left."""
    from torch.utils.data import DataLoader

    from hyperlora_jax.batches.pipelines import Order, array_batches, step_batches
    from hyperlora_jax.lora import vectorize
    from hyperlora_jax.lora_files import save_lora
    from hyperlora_jax.targets.lora_targets import open_lora_targets

    targets = open_lora_targets(place / "ours")
    files = []
    for k, vector in enumerate(vectors):
        lora = vectorize.unflatten(vector, spec)
        files.append(
            save_lora(place / f"{k}.safetensors", lora, spec, "diffusers", "float32", "sd1")
        )
    np.save(place / "matrix.npy", vectors)
    mapped = np.load(place / "matrix.npy", mmap_mode="r")
    count = len(vectors) // BATCH - 1
    cores = len(os.sched_getaffinity(0))

    def ours(batches) -> float:
        return _rate(batches, count, BATCH)

    def peer(dataset, workers: int) -> float:
        # Spawned: forked workers of a process with JAX's threads deadlock.
        context = "spawn" if workers else None
        loader = DataLoader(
            dataset,
            BATCH,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            multiprocessing_context=context,
        )
        return _rate(iter(loader), count, BATCH)

    def record(batches_of, dataset, workers: int, name: str) -> dict:
        return _compare(
            f"data/read/w2w {name}",
            lambda: ours(batches_of()),
            lambda: peer(dataset, workers),
            "LoRAs/s",
            runs,
        )

    def from_disk():
        order = Order(len(targets), 0)

        def batch(step: int) -> dict[str, np.ndarray]:
            return {"lora": targets.loras(order.at(step * BATCH + np.arange(BATCH)))}

        return step_batches(batch, cores)

    def from_matrix():
        return array_batches({"lora": mapped}, BATCH, seed=0)

    return [
        record(from_disk, _FileSet(files), 0, "against single files, no workers"),
        record(from_disk, _FileSet(files), cores, f"against single files, {cores} workers"),
        record(from_disk, _MatrixSet(place / "matrix.npy"), 0, "against a memory-mapped matrix"),
        record(from_matrix, _MatrixSet(place / "matrix.npy"), 0, "both from a mapped matrix"),
    ]


class _FileSet:
    """One safetensors file per LoRA, its tensors joined in key order."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int):
        import torch
        from safetensors.torch import load_file

        tensors = load_file(str(self.files[k]))
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


class _MatrixSet:
    """Rows of a memory-mapped matrix."""

    def __init__(self, path: Path):
        self.matrix = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, k: int):
        import torch

        return torch.from_numpy(np.array(self.matrix[k]))


def _gauge(spec: LoraSpec, vectors: np.ndarray, runs: int) -> list[dict]:
    """SVD gauge and tokens of a batch; the peer builds every delta and takes its SVD."""
    import jax

    from hyperlora_jax.lora import gauge, vectorize

    @jax.jit
    def turned(rows):
        lora = gauge.canonical(vectorize.unflatten(rows, spec), spec, "svd")
        return _tokens(lora, spec)

    def ours() -> float:
        start = time.perf_counter()
        for k in range(0, len(vectors), GAUGE_BATCH):
            jax.block_until_ready(turned(vectors[k : k + GAUGE_BATCH]))
        return len(vectors) / (time.perf_counter() - start)

    def peer() -> float:
        start = time.perf_counter()
        _full_svd(vectors[0], spec)
        return 1 / (time.perf_counter() - start)

    return [_compare("data/svd gauge and tokens/w2w", ours, peer, "LoRAs/s", runs)]


def _tokens(lora: Params, spec: LoraSpec) -> dict[int, Array]:
    """{width: [l, n, width]}: each row is one rank component of one factor."""
    import jax.numpy as jnp

    rows: dict[int, list] = {}
    for site in spec.sites:
        pair = site_factors(lora, site)
        down = pair["down"].reshape(-1, site.fan_in, site.rank)
        rows.setdefault(site.fan_in, []).append(jnp.swapaxes(down, -1, -2))
        rows.setdefault(site.out_features, []).append(pair["up"])
    return {width: jnp.concatenate(rows[width], axis=-2) for width in sorted(rows)}


def _full_svd(vector: np.ndarray, spec: LoraSpec) -> None:
    """The direct way: up·down in full, a truncated SVD of it, √σ to both sides."""
    import torch

    rest = torch.from_numpy(vector)
    for site in spec.sites:
        a, b, rest = rest.split(
            [site.in_features, site.out_features, len(rest) - site.in_features - site.out_features]
        )
        left, sigma, right = torch.svd_lowrank(b[:, None] @ a[None], q=site.rank + 2)
        root = sigma[: site.rank].sqrt()
        _ = left[:, : site.rank] * root, right[:, : site.rank] * root


def main(arguments: list[str] | None = None) -> int:
    """Prints the rows; --json FILE writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--num_loras", type=int, default=NUM_LORAS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--against", metavar="CHECKOUT")
    args = parser.parse_args(arguments)
    rows = run("cpu", args.num_loras, args.runs, args.against)
    for row in rows:
        print(f"{row['workload']:<55} {row['ours']:>9} {row['peer']:>9} {row['unit']} "
              f"× {row['ratio']}")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
