"""The nodes inside ComfyUI: its loader of custom nodes, executor, model and LoRA code.

COMFYUI=…/ComfyUI python -m pytest -m slow tests/runtime/test_comfyui_program.py, where ComfyUI's
requirements are installed.
"""

import asyncio
import os
import re
import sys
import types

import pytest
import torch
from PIL import Image

from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import load_lora
from hyperlora_jax.runtime.generate_lora import Applied, LoraGenerator
from hyperlora_jax.runtime.pytorch_folder import write_pytorch
from tests.runtime.conftest import hypernetwork
from tests.runtime.test_comfyui_nodes import FOLDER
from tests.stable_diffusion import conftest as tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no folder of ComfyUI"),
    pytest.mark.filterwarnings("ignore"),  # ComfyUI's own
]
SHARED = {"in_channels": 4, "out_channels": 4, "image_size": 8, "use_spatial_transformer": True,
          "legacy": False, "use_temporal_attention": False, "context_dim": 24,
          "model_channels": 32}  # fmt: skip
# {family: (diffusers' config, ComfyUI's, its class)}, of one network.
FAMILIES = {
    "sd1": (
        {
            "block_out_channels": [32, 64, 128, 128], "layers_per_block": 2,
            "attention_head_dim": 8, "norm_num_groups": 32,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        {
            "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "adm_in_channels": None,
            "transformer_depth": [1] * 6 + [0, 0], "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3, "use_linear_in_transformer": False,
        },
        "SD15",
    ),
    "sdxl": (
        {
            "block_out_channels": [32, 64, 128], "layers_per_block": 2,
            "attention_head_dim": [1, 1, 2], "norm_num_groups": 32,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "transformer_layers_per_block": [1, 1, 2], "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 20 + 6 * 6,
        },
        {
            "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "num_classes": "sequential",
            "adm_in_channels": 20 + 6 * 6, "transformer_depth": [0, 0, 1, 1, 2, 2],
            "transformer_depth_middle": 2, "transformer_depth_output": [0] * 3 + [1] * 3 + [2] * 3,
            "use_linear_in_transformer": True,
        },
        "SDXL",
    ),
}  # fmt: skip


@pytest.fixture(name="comfy", scope="module")
def _comfy():
    """ComfyUI's modules, on the processor."""
    sys.path.insert(0, os.environ["COMFYUI"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_patcher
    import comfy.supported_models
    import execution
    import folder_paths
    import nodes

    yield types.SimpleNamespace(comfy=comfy, execution=execution, nodes=nodes, paths=folder_paths)
    sys.path.remove(os.environ["COMFYUI"])


def patcher(comfy, family, unet):
    """ComfyUI's model of the same structure with the same weights."""
    _, config, name = FAMILIES[family]
    models = comfy.comfy.supported_models
    known = getattr(models, name)({**SHARED, **config, "dtype": torch.float32})
    if family == "sdxl":
        known.unet_config["num_head_channels"] = 64
    model = known.get_model({}, device="cpu")
    names = comfy.comfy.utils.unet_to_diffusers(known.unet_config)
    weights = {names[key]: value for key, value in unet.state_dict().items()}
    model.diffusion_model.load_state_dict(weights)  # strict: every weight has a name in both
    cpu = torch.device("cpu")
    return comfy.comfy.model_patcher.ModelPatcher(model.eval(), cpu, cpu)


def node(**members):
    return type("Node", (), {"FUNCTION": "run", "CATEGORY": "", "RETURN_TYPES": (), **members})


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_picture_to_what_is_drawn(family, comfy, tmp_path, monkeypatch):
    unet = tiny.torch_unet(tiny.tiny_unet_config(**FAMILIES[family][0])).eval()
    sites = [
        LoraSite(path, layer.weight.shape[1], layer.weight.shape[0], 2,
                 *(("conv", layer.kernel_size) if layer.weight.ndim == 4 else ()))
        for path, layer in unet.named_modules()
        if re.search(r"attentions.*(to_[qkv]|to_out\.0|proj_in|net\.2)$|resnets\.\d\.conv1$", path)
    ]  # fmt: skip
    folder, spec = tmp_path / "hyper", LoraSpec(tuple(sites))
    hyper = hypernetwork("knn", spec=spec, facts={"family": family})
    hyper.constants["vectors"] *= 0.1  # larger ones make a network that amplifies rounding
    write_pytorch(hyper, folder)
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(comfy.paths, f"{name}_directory", str(tmp_path / name))
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "input" / "anna.png")
    assert asyncio.run(comfy.nodes.load_custom_node(str(FOLDER)))
    found, base = [], patcher(comfy, family, unet)
    registry = comfy.nodes.NODE_CLASS_MAPPINGS
    monkeypatch.setitem(registry, "Base", node(
        RETURN_TYPES=("MODEL",), INPUT_TYPES=staticmethod(lambda: {"required": {}}),
        run=lambda self: (base,)))  # fmt: skip
    monkeypatch.setitem(registry, "Keep", node(
        OUTPUT_NODE=True, run=lambda self, model: found.append(model) or {},
        INPUT_TYPES=staticmethod(lambda: {"required": {"model": ("MODEL",)}})))  # fmt: skip
    prompt = {
        "1": ("Base", {}),
        "2": ("LoadImage", {"image": "anna.png"}),
        "3": ("HyperloraLoader", {"folder": str(folder), "device": "cpu"}),
        "4": ("HyperloraFromPicture", {"hypernetwork": ["3", 0], "image": ["2", 0],
                                       "batch_is": "one subject", "seed": 3}),
        "5": ("HyperloraApply", {"model": ["1", 0], "lora": ["4", 0], "strength": 0.5}),
        "6": ("HyperloraSave", {"lora": ["4", 0], "filename_prefix": "loras/anna",
                                "format": "kohya"}),
        "7": ("Keep", {"model": ["5", 0]}),
    }  # fmt: skip
    prompt = {key: {"class_type": kind, "inputs": given} for key, (kind, given) in prompt.items()}
    valid, error, outputs, _ = asyncio.run(comfy.execution.validate_prompt("p", prompt, None))
    assert valid, error
    server = types.SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    executor = comfy.execution.PromptExecutor(server)
    executor.execute(prompt, "p", {}, outputs)
    assert executor.success, executor.status_messages
    (file,) = (tmp_path / "output").rglob("*.safetensors")
    assert load_lora(file)[1] == spec and file.parent.name == "loras"
    (patched,) = found
    assert len(patched.patches) == len(spec)  # every layer has found its weight

    random = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=random) for shape in ((2, 4, 8, 8), (2, 7, 24)))
    given, added = {}, {}
    if family == "sdxl":
        added = {"text_embeds": torch.randn(2, 20, generator=random), "time_ids": torch.ones(2, 6)}
        unet.add_embedding.register_forward_pre_hook(lambda _, args: given.update(y=args[0]))

    def drawn():
        with torch.no_grad():
            return unet(x, torch.tensor([10, 700]), text, added_cond_kwargs=added).sample

    def by_comfy():
        with torch.no_grad():
            return base.model.diffusion_model(x, torch.tensor([10, 700]), text, **given)

    plain = drawn()
    assert (by_comfy() - plain).abs().max() <= 1e-4 * plain.abs().max()
    hyper = LoraGenerator(folder)
    picture = Image.open(tmp_path / "input" / "anna.png")
    vector = hyper.generate([[picture]], seed=3)[0][0]
    Applied(unet, hyper, hyper.matrices(vector, 0.5 * hyper.config["strength"]))
    expected = drawn()
    patched.patch_model()
    try:
        difference = (by_comfy() - expected).abs().max()
    finally:
        patched.unpatch_model()
    assert difference <= 1e-4 * expected.abs().max()
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert (by_comfy() - plain).abs().max() <= 1e-4 * plain.abs().max()
