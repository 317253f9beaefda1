"""The ONNX file gives what PyTorch gives, for any number of subjects and pictures."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from hyperlora_jax.cli.main import main
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.runtime.generate_lora import LoraGenerator
from hyperlora_jax.runtime.onnx_file import write_onnx
from hyperlora_jax.runtime.pytorch_folder import write_pytorch
from tests import user_world
from tests.runtime.conftest import hypernetwork

# The exporter's own, of onnxscript and torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*:FutureWarning")


@pytest.mark.parametrize(
    "kind",
    ["knn", pytest.param("regression", marks=pytest.mark.slow),
     pytest.param("iterative", marks=pytest.mark.slow),
     pytest.param("diffusion", marks=pytest.mark.slow),
     pytest.param("latent_diffusion", marks=pytest.mark.slow)],
)  # fmt: skip
def test_onnxruntime_gives_the_same(kind, tmp_path):
    hyper = hypernetwork(kind, network={"depth": 1}, facts={"generate": {"num_steps": 2}})
    hyper.save(tmp_path / "hyper")
    write_pytorch(hyper, tmp_path / "torch")
    out = tmp_path / "onnx"
    command = ["export", tmp_path / "hyper", "--out", out, "--format", "onnx"]
    assert main([str(word) for word in command]) == 0
    session = onnxruntime.InferenceSession(
        out / "hypernetwork.onnx", providers=["CPUExecutionProvider"]
    )
    layout = json.loads((out / "hypernetwork.json").read_text())
    assert json.loads(session.get_modelmeta().custom_metadata_map["hyperlora"]) == layout
    sizes = [np.prod(site["down"]) + np.prod(site["up"]) for site in layout["sites"]]
    network, random = LoraGenerator(tmp_path / "torch"), np.random.default_rng(1)
    for subjects, pictures in ((1, 1), (4, 2)):
        given = {"pictures": random.uniform(size=(subjects, pictures, 16, 16, 3))}
        if size := network.config["noise_size"]:
            given["noise"] = random.normal(size=(subjects, 1, size))
        given = {name: value.astype(np.float32) for name, value in given.items()}
        vectors, known = session.run(["lora", "familiarity"], given)
        ours = network(**{name: torch.from_numpy(value) for name, value in given.items()})
        assert vectors.shape == (subjects, sum(sizes))
        assert np.abs(vectors - ours[0].numpy()).max() <= 1e-5 * np.abs(vectors).max()
        np.testing.assert_allclose(known, ours[1].numpy(), atol=1e-6)


def test_an_onnx_encoder_is_refused(tmp_path):
    encoder = load_condition_encoder(user_world.write_onnx(tmp_path / "encoder.onnx"))
    with pytest.raises(UserError, match="is an ONNX file itself"):
        write_onnx(hypernetwork("knn", encoder), tmp_path / "out")
