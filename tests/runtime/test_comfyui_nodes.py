"""The ComfyUI nodes against a stand-in of the few interfaces that they use: no ComfyUI runs."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from hyperlora_jax.lora_files import load_lora, read_metadata
from hyperlora_jax.runtime.pytorch_folder import write_pytorch
from tests.runtime.conftest import SPEC, hypernetwork

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"


class Patcher:
    """Of comfy.model_patcher.ModelPatcher: `model`, `clone` and `add_patches`."""

    def __init__(self, weights):
        self.model = types.SimpleNamespace(state_dict=lambda: weights)
        self.patches = {}

    def clone(self):
        other = Patcher(self.model.state_dict())
        other.patches = dict(self.patches)
        return other

    def add_patches(self, patches, strength):
        self.patches |= {key: (strength, patch) for key, patch in patches.items()}
        return list(patches)


def keys_of(model, keys):
    """kohya's names with diffusers' paths, as comfy.lora.model_lora_keys_unet maps them."""
    for key in model.state_dict():
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        keys["lora_unet_" + path.replace(".", "_")] = key
    return keys


def patches_of(lora, keys):
    """{weight: ("lora", (up, down, alpha, mid))}, as comfy.lora.load_lora."""
    return {
        key: ("lora", (lora[f"{n}.lora_up.weight"], lora[f"{n}.lora_down.weight"], None, None))
        for n, key in keys.items()
        if f"{n}.lora_up.weight" in lora
    }


@pytest.fixture(name="nodes")
def _nodes(monkeypatch, tmp_path):
    comfy, lora, folders = (types.ModuleType(n) for n in ("comfy", "comfy.lora", "folder_paths"))
    lora.model_lora_keys_unet, lora.load_lora, comfy.lora = keys_of, patches_of, lora
    folders.get_output_directory = lambda: str(tmp_path / "output")
    folders.get_save_image_path = lambda prefix, root: (root, prefix, 1, "", prefix)
    for module in (comfy, lora, folders):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "output").mkdir()
    spec = importlib.util.spec_from_file_location("hyperlora_nodes", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def weights(width):
    shapes = {site.path: (site.out_features, site.in_features) for site in SPEC}
    shapes[SPEC.sites[-1].path] = (32, width)
    return {f"diffusion_model.{path}.weight": torch.zeros(s) for path, s in shapes.items()}


def test_from_a_picture_to_a_model_and_a_file(nodes, tmp_path):
    write_pytorch(hypernetwork("knn"), tmp_path / "hyper")
    (hyper,) = nodes["HyperloraLoader"]().load(str(tmp_path / "hyper"), "cpu")
    image = torch.rand(3, 20, 24, 3, generator=torch.Generator().manual_seed(0))
    generate = nodes["HyperloraFromPicture"]().generate
    (one,), said = generate(hyper, image, "one subject", 0)["result"]
    many, _ = generate(hyper, image, "many subjects", 0)["result"]
    assert len(many) == 3 and said[0].startswith("familiarity 0.")
    model = Patcher(weights(SPEC.sites[-1].in_features))
    patched, clip = nodes["HyperloraApply"]().apply(model, one, 0.5, "clip")
    assert clip == "clip" and not model.patches and len(patched.patches) == len(SPEC)
    strength, (_, (up, down, alpha, _)) = patched.patches[
        f"diffusion_model.{SPEC.sites[0].path}.weight"
    ]
    assert strength == 0.5 and alpha is None
    assert (down.shape, up.shape) == (one[1][0][0].shape, one[1][0][1].shape)
    (file,) = nodes["HyperloraSave"]().save(one, "anna", "kohya")["ui"]["text"]
    assert load_lora(file)[1] == SPEC
    assert read_metadata(file)["hyperlora.seed"] == "0"


def test_another_family_and_another_folder_are_one_line(nodes, tmp_path):
    with pytest.raises(ValueError, match=r"found no generate\.py"):
        nodes["HyperloraLoader"]().load(str(tmp_path), "cpu")
    write_pytorch(hypernetwork("mean"), tmp_path / "hyper")
    (hyper,) = nodes["HyperloraLoader"]().load(str(tmp_path / "hyper"), "cpu")
    (lora,), _ = nodes["HyperloraFromPicture"]().generate(
        hyper, torch.zeros(1, 16, 16, 3), "one subject", 0
    )["result"]
    for model in (Patcher({}), Patcher(weights(width=999))):
        with pytest.raises(ValueError, match="of another family than sd1"):
            nodes["HyperloraApply"]().apply(model, lora, 1.0)
