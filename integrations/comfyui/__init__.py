"""ComfyUI nodes of an exported hypernetwork: a picture in, a LoRA on the model.

Copy or link this folder into ComfyUI/custom_nodes; see README.md. What the nodes hand on as LORA is
(the hypernetwork, the LoRA's matrices, texts for a file's header).
"""

import importlib.util
from pathlib import Path
from typing import Any

import comfy.lora
import folder_paths
import numpy as np
from PIL import Image


class HypernetworkLoader:
    """The folder that `hyperlora export --format pytorch` wrote."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("HYPERNETWORK",), "load", "hyperlora"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Where it lies, and what it runs on."""
        return {"required": {"folder": ("STRING", {"default": ""}), "device": (["cpu", "cuda"],)}}

    def load(self, folder: str, device: str) -> tuple[Any]:
        """Runs the folder's own generate.py."""
        program = Path(folder) / "generate.py"
        if not program.is_file():
            raise ValueError(
                f"{folder}: found no generate.py, expected the folder that "
                "`hyperlora export --format pytorch` wrote"
            )
        spec = importlib.util.spec_from_file_location("hyperlora_generate", program)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return (module.LoraGenerator(folder, device),)


class LoraFromPicture:
    """A batch of pictures is one subject, or every picture is one."""

    RETURN_TYPES, RETURN_NAMES = ("LORA", "STRING"), ("lora", "familiarity")
    OUTPUT_IS_LIST = (True, True)
    FUNCTION, CATEGORY = "generate", "hyperlora"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Pictures [b, h, w, 3] in [0, 1]."""
        return {
            "required": {
                "hypernetwork": ("HYPERNETWORK",),
                "image": ("IMAGE",),
                "batch_is": (["one subject", "many subjects"],),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
            }
        }

    def generate(self, hypernetwork: Any, image: Any, batch_is: str, seed: int) -> dict[str, Any]:
        """A LoRA for each subject; the node shows how familiar each is."""
        pixels = np.uint8(np.clip(image.cpu().numpy(), 0, 1) * 255 + 0.5)
        pictures = [Image.fromarray(one) for one in pixels]
        subjects = [pictures] if batch_is == "one subject" else [[one] for one in pictures]
        vectors, known = hypernetwork.generate(subjects, seed)
        strength = hypernetwork.config["strength"]
        loras, said = [], []
        for vector, score in zip(vectors, known, strict=True):
            texts = {"seed": seed, "strength": strength}
            said.append("familiarity unknown" if score is None else f"familiarity {score:.2f}")
            if score is not None:
                texts["familiarity"] = f"{score:.3f}"
                said[-1] += ": unlike all that was trained on" if score < 0.02 else ""
            loras.append((hypernetwork, hypernetwork.matrices(vector), texts))
        return {"ui": {"text": said}, "result": (loras, said)}


class ApplyToModel:
    """Patches the model as a LoRA file would; CLIP passes through."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "apply", "hyperlora"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The strength is on top of the checkpoint's own."""
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}
        required = {"model": ("MODEL",), "lora": ("LORA",), "strength": ("FLOAT", strength)}
        return {"required": required, "optional": {"clip": ("CLIP",)}}

    def apply(self, model: Any, lora: Any, strength: float, clip: Any = None) -> tuple[Any, Any]:
        """Raises ValueError for a base of another family."""
        hypernetwork, matrices, _ = lora
        family, names = (
            hypernetwork.config["family"],
            hypernetwork.config["files"]["kohya"]["names"],
        )
        keys, weights = comfy.lora.model_lora_keys_unet(model.model, {}), model.model.state_dict()
        tensors = {}
        for name, (down, up) in zip(names, matrices, strict=True):
            expected, key = [up.shape[0], down.shape[1]], keys.get(name)
            found = [*weights[key].shape[:2]] if key in weights else "no such layer"
            if found != expected:
                raise ValueError(
                    f"model: is of another family than {family}, found {found} at {name}, "
                    f"expected {expected}"
                )
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        patched = model.clone()
        patched.add_patches(comfy.lora.load_lora(tensors, keys), strength)
        return patched, clip


class SaveLora:
    """Writes the LoRA into ComfyUI's output folder."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "hyperlora", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the file is called; a number keeps earlier ones."""
        return {
            "required": {
                "lora": ("LORA",),
                "filename_prefix": ("STRING", {"default": "loras/hyperlora"}),
                "format": (["kohya", "diffusers"],),
            }
        }

    def save(self, lora: Any, filename_prefix: str, format: str) -> dict[str, Any]:
        """Names the file in the node."""
        hypernetwork, matrices, texts = lora
        folder, name, number, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        path = Path(folder) / f"{name}_{number:05}_.safetensors"
        hypernetwork.save(path, matrices, format, **texts)
        return {"ui": {"text": [str(path)]}}


NODE_CLASS_MAPPINGS = {
    "HyperloraLoader": HypernetworkLoader,
    "HyperloraFromPicture": LoraFromPicture,
    "HyperloraApply": ApplyToModel,
    "HyperloraSave": SaveLora,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HyperloraLoader": "Hypernetwork loader",
    "HyperloraFromPicture": "LoRA from picture",
    "HyperloraApply": "Apply to model",
    "HyperloraSave": "Save LoRA",
}
