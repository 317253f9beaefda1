"""The ONNX file gives what PyTorch gives, for any number of subjects and pictures."""

import json

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hyperlora_jax.cli.main import main
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import vectorize
from hyperlora_jax.runtime.exporters import exporting
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
    network = LoraGenerator(tmp_path / "torch")
    for subjects, pictures in ((1, 1), (4, 2)):
        inputs = given(session, subjects, pictures)
        vectors, known = session.run(["lora", "familiarity"], inputs)
        ours = network(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        assert vectors.shape == (subjects, sum(sizes))
        assert np.abs(vectors - ours[0].numpy()).max() <= 1e-5 * np.abs(vectors).max()
        np.testing.assert_allclose(known, ours[1].numpy(), atol=1e-6)


def given(session, subjects, pictures, seed=1):
    """Inputs of a graph, at random."""
    random = np.random.default_rng(seed)
    shapes = {one.name: one.shape for one in session.get_inputs()}
    found = {"pictures": random.uniform(size=(subjects, pictures, *shapes["pictures"][2:]))}
    if "noise" in shapes:
        found["noise"] = random.normal(size=(subjects, *shapes["noise"][1:]))
    return {name: value.astype(np.float32) for name, value in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["knn", "diffusion"])
@pytest.mark.parametrize("name", ["encoder.onnx", "vit"])
def test_encoders_of_others_are_inside(kind, name, tmp_path):
    write = {"encoder.onnx": user_world.write_onnx, "vit": user_world.write_vit}[name]
    encoder = load_condition_encoder(write(tmp_path / name), mean=(0.4, 0.5, 0.6), std=(0.3,))
    hyper = hypernetwork(kind, encoder, network={"depth": 1}, facts={"generate": {"num_steps": 2}})
    write_onnx(hyper, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "hypernetwork.onnx")
    for subjects, pictures in ((1, 1), (4, 2)):
        inputs = given(session, subjects, pictures)
        vectors, known = session.run(["lora", "familiarity"], inputs)
        np.testing.assert_allclose(known, hyper.familiarity(inputs["pictures"]), atol=1e-6)
        if kind == "knn":
            ours = hyper.write(jax.random.key(0), *hyper.embed(inputs["pictures"]))
            ours = np.asarray(vectorize.flatten(ours, hyper.spec))
            assert np.abs(vectors - ours).max() <= 1e-5 * np.abs(ours).max()


def test_an_encoder_of_a_fixed_number_of_pictures_is_refused(tmp_path):
    file = user_world.write_onnx(tmp_path / "encoder.onnx")
    model = onnx.load(file)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, file)
    with pytest.raises(UserError, match="takes 1 pictures at a time, expected any number"):
        write_onnx(hypernetwork("knn", load_condition_encoder(file)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_exporter_says_is_one_line():
    def fail():
        try:
            raise TypeError("no such\n operator")
        except TypeError as error:
            raise torch.onnx.OnnxExporterError("a page\nof advice") from error

    said = r"^graph: PyTorch's exporter cannot do this \(TypeError: no such operator\)$"
    with pytest.raises(UserError, match=said), exporting("graph", "torch"):
        fail()
    with pytest.raises(UserError, match=r"^graph: needs nowhere, which is not installed; pip"):
        exporting("graph", "nowhere").__enter__()
