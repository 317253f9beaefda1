"""The v5e rows of `tools/bench.py unet`: how many images of 512² fit a chip, found by compiling.

Nothing runs: libtpu's compiler says whether the bf16 LoRA step of SD 1.5 (rank 8 on q, k, v, out,
one LoRA an image, frozen base on every chip) fits 15.75 GiB. A compilation takes minutes; records
are kept beside JAX's compilation cache, so that a search that was stopped goes on where it was.
"""

import sys
from typing import Any

from bench_unet_steps import SD15, row
from lora_workload import lora_workload

from hyperlora_jax.aot import ahead_of_time

ahead_of_time.prepare_environment()

from hyperlora_jax.aot import compile_search  # noqa: E402
from hyperlora_jax.cli.compile import records_folder  # noqa: E402
from hyperlora_jax.parallel.topology import parse  # noqa: E402

MAXDIFFUSION = 4  # images per chip: 12.69 GiB of temporaries and 1.61 GiB of weights
SEARCH = {"none": (16, 24), "save_attention": (32, 48)}  # where to begin, most to try


def sd15_v5e() -> list[dict[str, Any]]:
    """One row for each rematerialisation; the peer is MaxDiffusion's UNet in the same compiler."""
    return [_row(remat, start, limit) for remat, (start, limit) in SEARCH.items()]


def _row(remat: str, start: int, limit: int) -> dict[str, Any]:
    found = compile_search.search(
        [lora_workload(SD15, remat=remat)],
        parse("v5e:2x2"),
        limit=limit,
        start=start,
        report=_say,
        records=records_folder(),
    )
    images = found["batch_per_chip"] if found else 0
    return {
        **row("unet/sd15/512/v5e", images, MAXDIFFUSION, "images/chip", images / MAXDIFFUSION),
        "runs": 1,
        "machine": "libtpu's compiler, no TPU",
        "peer_name": "MaxDiffusion UNet",
        "remat": remat,
        "record": found,
    }


def _say(record: dict[str, Any]) -> None:
    verdict = "fits" if record["fits"] else f"does not fit: {record.get('reason', '')[:160]}"
    print(
        f"remat {record['remat']}, {record['batch_per_chip']} images a chip: {verdict}",
        file=sys.stderr,
        flush=True,
    )
