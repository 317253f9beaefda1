"""`hyperlora train` on every mesh: the same losses, through pictures and in weight space."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hyperlora_jax.train.json_lines import read_rows

MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
SETTINGS = {
    "data.num_identities": 16, "data.num_views": 4, "model.network.width": 64,
    "model.network.depth": 2, "model.network.num_heads": 8, "model.network.scan": True,
    "distill.num_concepts": 8, "distill.num_steps": 5, "train.num_steps": 20,
    "train.batch_size": 8, "train.images_per_subject": 1, "train.log_every_steps": 1,
}  # fmt: skip
OBJECTIVES = {
    "pictures": {"end_to_end": 1.0, "delta": 0.0, "whitened": 0.0},
    "weights": {"end_to_end": 0.0, "delta": 1.0, "whitened": 1.0},
}


def hyperlora(command, workdir, cache, devices=1, **changes):
    """Runs the program in a process of its own with some simulated devices."""
    settings = {**SETTINGS, **changes}
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }  # fmt: skip
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hyperlora_jax", command, "--config", "configs/demo.py"),
            *("--workdir", str(workdir)),
            *(f"--config.{name}={value}" for name, value in settings.items()),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_mesh_gives_the_same_losses(tmp_path, objective):
    hyperlora("distill", tmp_path / "made", tmp_path / "xla")
    changes = {f"train.objectives.{name}": value for name, value in OBJECTIVES[objective].items()}
    if objective == "weights":
        changes["data.targets"] = str(tmp_path / "made" / "targets")
    found = {}
    for mesh in MESHES:
        workdir = tmp_path / "-".join(map(str, mesh))
        sizes = {
            f"mesh.{axis}": size
            for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
        }
        printed = hyperlora(
            "train", workdir, tmp_path / "xla", int(np.prod(mesh)), **sizes, **changes
        )
        found[mesh] = np.asarray([row["loss"] for row in read_rows(workdir / "metrics.jsonl")])
        assert len(found[mesh]) == SETTINGS["train.num_steps"]
        if mesh == (2, 2, 2):  # the proof was not made on copies
            assert "(None, 'fsdp', 'tensor', None)" in printed, printed[-3000:]
    for mesh in MESHES[1:]:
        np.testing.assert_allclose(found[mesh][:5], found[MESHES[0]][:5], rtol=1e-5, err_msg=mesh)
        np.testing.assert_allclose(found[mesh], found[MESHES[0]], rtol=1e-3, err_msg=mesh)
