"""Run by the slow tests inside another environment: python consumer.py KIND BASE FILE… -> JSON.

Loads files that the parent test wrote and prints, for each, how many modules were adapted, the
largest difference of outputs against merged weights, the change against the base, and every
warning. Uses nothing of this project but the merged deltas that lie beside the file (.npz), so
that it proves what a stranger's program sees.
"""

import contextlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch


def models(base):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts = {"unet": UNet2DConditionModel.from_pretrained(base / "unet")}
    for name, kind in (
        ("text_encoder", CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        if (base / name).is_dir():
            parts[name] = kind.from_pretrained(base / name)
    return {name: part.float().eval() for name, part in parts.items()}


def outputs(parts):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=random)
    states = torch.randn(1, 7, parts["unet"].config.cross_attention_dim, generator=random)
    added = None
    if parts["unet"].config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
    results = [parts["unet"](x, 10, states, added_cond_kwargs=added, return_dict=False)[0]]
    ids = torch.arange(8)[None]
    for name in sorted(set(parts) - {"unet"}):
        results.append(parts[name](ids, return_dict=False)[0])
    return results


def distance(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def merged(base, deltas):
    parts = models(base)
    for name, delta in deltas.items():
        component = name.split(".")[0] if name.startswith("text_encoder") else "unet"
        path = name.removeprefix(component + ".")
        model = parts[component]
        modules = dict(model.named_modules())
        layer = modules.get(path) or modules[path.removeprefix("text_model.")]
        layer.weight.data += torch.from_numpy(delta).reshape(layer.weight.shape)
    return parts


def with_diffusers(parts, file):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    shared = {"vae": None, "tokenizer": None, "scheduler": DDIMScheduler(), "unet": parts["unet"],
              "text_encoder": parts["text_encoder"]}  # fmt: skip
    if "text_encoder_2" in parts:
        pipeline = StableDiffusionXLPipeline(
            **shared, text_encoder_2=parts["text_encoder_2"], tokenizer_2=None,
            add_watermarker=False,
        )  # fmt: skip
    else:
        pipeline = StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="a")
    return sum("a" in getattr(m, "lora_A", {}) for p in parts.values() for m in p.modules())


def with_peft(parts, folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(parts["unet"], str(folder), adapter_name="a")
    return sum("a" in getattr(m, "lora_A", {}) for m in model.modules())


def with_lycoris(parts, file):
    from lycoris import wrapper
    from safetensors.torch import load_file

    wrapper.LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})
    state = {k: v for k, v in load_file(file).items() if k.startswith("lora_unet")}
    network, _ = wrapper.create_lycoris_from_weights(1.0, None, parts["unet"], weights_sd=state)
    network.merge_to(1.0)
    return len(network.loras)


def main():
    kind, base, *files = sys.argv[1:]
    load = {"diffusers": with_diffusers, "peft": with_peft, "lycoris": with_lycoris}[kind]
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    for name in ("diffusers", "peft"):
        logging.getLogger(name).handlers = [handler]
    results = []
    for file in map(Path, files):
        with np.load(str(file) + ".npz") as stored:
            deltas = dict(stored)
        heard.truncate(0)
        heard.seek(0)
        with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            plain, wanted = outputs(models(Path(base))), outputs(merged(Path(base), deltas))
            parts = models(Path(base))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                modules = load(parts, file)
            found = outputs(parts)
        messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        results.append(
            {
                "modules": modules,
                "max_abs_diff": distance(found, wanted),
                "output_change": distance(found, plain),
                "warnings": [*messages, *heard.getvalue().splitlines()],
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
