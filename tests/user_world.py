"""What a user has on the disk, written by other software: a Stable Diffusion folder (PyTorch
diffusers), a CLIP vision folder and a ViT (transformers), an ONNX encoder, folders of pictures.

    python -m tests.user_world DIR      writes all of it, to try commands by hand
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.stable_diffusion import conftest as tiny

# Number of pictures, and shape (height, width), of every person's folder: no two are alike.
PEOPLE = {
    "anna": (2, (40, 40)),
    "bert": (5, (48, 64)),
    "carl": (3, (100, 70)),
    "dora": (4, (33, 31)),
    "emil": (6, (64, 64)),
    "fred": (3, (24, 24)),
}
# A network that compiles in seconds.
NETWORK = ("width=16", "depth=1", "num_heads=2", "mlp_ratio=2")
SHRUNK = tuple(f"--config.model.network.{value}" for value in NETWORK)


def write_base(
    root: Path, unet: dict | None = None, text: dict | None = None, vae: dict | None = None
) -> Path:
    """A tiny Stable Diffusion 1.x of random weights (32 pixels), saved by PyTorch diffusers.

    `unet`, `text` and `vae` change the configs of its parts.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    texts = tiny.tiny_text_config(**(text or {}))
    StableDiffusionPipeline(
        unet=tiny.torch_unet(tiny.tiny_unet_config(**(unet or {}))),
        vae=tiny.torch_vae(tiny.tiny_vae_config(**(vae or {}))),
        text_encoder=tiny.torch_text(texts),
        tokenizer=tiny.write_tokenizer(root / "tokenizer", texts["max_position_embeddings"]),
        scheduler=DDIMScheduler.from_config(tiny.SD1_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root)
    return root


def write_clip(root: Path, seed: int = 0, **changes: int) -> Path:
    """A tiny CLIP vision encoder (24 pixels, 16 patches) saved by transformers; `changes` of its
    config."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 24, "patch_size": 6, "projection_dim": 12,
    }  # fmt: skip
    config = CLIPVisionConfig(**sizes | changes)
    tiny.randomise(CLIPVisionModelWithProjection(config), seed).save_pretrained(root)
    side = config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(root)
    return root


def write_vit(root: Path, seed: int = 0) -> Path:
    """A tiny ViT (20 pixels) saved by transformers; read through PyTorch."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=20, patch_size=5,
    )  # fmt: skip
    tiny.randomise(ViTModel(config), seed).save_pretrained(root)
    return root


def write_onnx(file: Path, seed: int = 0, size: int = 28) -> Path:
    """An ONNX image encoder exported by nobody's tool but onnx itself: pixels -> 10 numbers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    kernel = random.normal(size=(10, 3, 7, 7)).astype(np.float32) / 12
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["maps"], strides=[7, 7]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["embedding"]),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["b", 3, size, size])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["b", 10])
    weights = [numpy_helper.from_array(kernel, "kernel")]
    graph = helper.make_graph(nodes, "encoder", [pixels], [embedding], weights)
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), file)
    return file


def write_people(root: Path, people: dict[str, tuple[int, tuple[int, int]]] | None = None) -> Path:
    """A folder of pictures per person: own colours in every folder, PNG and JPEG in turn."""
    for number, (name, (count, (height, width))) in enumerate((people or PEOPLE).items()):
        (root / name).mkdir(parents=True)
        random = np.random.default_rng(number)
        colour = random.integers(40, 216, (1, 1, 3))
        for k in range(count):
            rough = random.integers(-40, 40, (4, 4, 3))
            blocks = np.uint8(np.clip(colour + rough, 0, 255))
            picture = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(root / name / f"{k}.{('png', 'jpg')[k % 2]}", quality=95)
    return root


def write_all(root: Path) -> Path:
    """base/, clip/, vit/, encoder.onnx and people/ below `root`."""
    write_base(root / "base")
    write_clip(root / "clip")
    write_vit(root / "vit")
    write_onnx(root / "encoder.onnx")
    write_people(root / "people")
    return root


def hyperlora(*arguments: object, timeout: float = 500, **environment: str):
    """The command in a process of its own, as from a shell: (exit code, stdout, stderr)."""
    flags = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
    done = subprocess.run(
        [sys.executable, "-m", "hyperlora_jax", *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    print(write_all(Path(sys.argv[1])))
