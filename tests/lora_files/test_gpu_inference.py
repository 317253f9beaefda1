"""Exported LoRAs share rank, scale and targets: compiled pipelines swap them as they run."""

import re
from pathlib import Path

import pytest

from hyperlora_jax.lora_files import load_lora, save_lora
from hyperlora_jax.lora_files.verify import verify
from tests.lora_files.conftest import random_lora, spec_of, torch_modules

DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu_inference.md"


@pytest.mark.parametrize("format", ["kohya", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_swapping_recompiles_nothing(tmp_path, format):
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    modules = torch_modules("sd1")
    spec = spec_of(modules, "attn-qkvo", rank=2, text=False)
    loras = [random_lora(spec, seed) for seed in range(3)]
    for i, lora in enumerate(loras):
        save_lora(tmp_path / f"{i}.safetensors", lora, spec, format, "float32")
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=modules["unet"],
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    load = {"adapter_name": "subject"}
    pipeline.load_lora_weights(str(tmp_path), weight_name="0.safetensors", **load)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    unet = torch.compile(pipeline.unet, backend=count)
    x, states = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    outputs = []
    with torch.no_grad():
        for i in range(3):
            if i:
                name = f"{i}.safetensors"
                pipeline.load_lora_weights(
                    str(tmp_path), weight_name=name, hotswap=True, **load
                )  # fmt: skip
            outputs.append(unet(x, 10, states, return_dict=False)[0])
            if i == 0:
                compiled = len(graphs)
    assert len(graphs) == compiled
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[1] - outputs[2]).abs().max() > 1e-3
    # The last one swapped in is what a fresh load of its file gives.
    pipeline.unload_lora_weights()
    assert verify(tmp_path / "2.safetensors", modules, loras[2], spec).ok
    pipeline.load_lora_weights(str(tmp_path), weight_name="2.safetensors", **load)
    with torch.no_grad():
        fresh = pipeline.unet(x, 10, states, return_dict=False)[0]
    assert (fresh - outputs[2]).abs().max() < 1e-5
    torch._dynamo.reset()


def test_the_examples_of_the_document_run(tmp_path, monkeypatch):
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    modules = torch_modules("sd1")
    spec = spec_of(modules, "attn-qkvo", rank=2, text=False)
    folder = tmp_path / "loras"
    for i, name in enumerate(("anna", "ben")):
        save_lora(folder / f"{name}.safetensors", random_lora(spec, i), spec, dtype="float32")
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=modules["unet"],
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip

    def render(prompt):
        noise = torch.Generator().manual_seed(1)
        states = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(0))
        return pipeline(
            prompt_embeds=states, negative_prompt_embeds=states, num_inference_steps=1,
            height=16, width=16, output_type="np", generator=noise,
        ).images[0]  # fmt: skip

    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    pipeline.set_progress_bar_config(disable=True)
    text = DOCUMENT.read_text().partition("# Using the files")[2]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    names = {"pipe": pipeline, "LORAS": str(folder), "render": render, "torch": torch}
    for block in blocks[1:]:
        if "from lora_unet" in block:  # tests/runtime/test_base_export.py
            continue
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert load_lora(folder / "anna.safetensors", spec)[1] == spec
