"""Tiny PyTorch models of every family with every tensor drawn at random."""

import json

import numpy as np
import pytest


def tiny_unet_config(**changes):
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        **changes,
    }


def tiny_vae_config(**changes):
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 16, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 32,
        "scaling_factor": 0.5,
        **changes,
    }


def tiny_text_config(**changes):
    return {
        "vocab_size": 99,
        "hidden_size": 24,
        "intermediate_size": 48,
        "projection_dim": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 16,
        "hidden_act": "quick_gelu",
        "bos_token_id": 97,
        "eos_token_id": 98,
        "pad_token_id": 98,
        **changes,
    }


def randomise(module, seed=0):
    """Draws every parameter, biases and norms included, so that none stays at 0 or 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator)
            base = 1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_(base + noise / fan_in**0.5)
    return module.eval()


def torch_unet(config, seed=0):
    from diffusers import UNet2DConditionModel

    return randomise(UNet2DConditionModel(**config), seed)


def torch_vae(config, seed=1):
    from diffusers import AutoencoderKL

    return randomise(AutoencoderKL(**config), seed)


def torch_text(config, seed=2, projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return randomise(cls(CLIPTextConfig(**config)), seed)


def nchw(array):
    """PyTorch tensor of an NHWC array."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.asarray(array).transpose(0, 3, 1, 2)))


def flax_params(module, flax_module, component="unet"):
    """Our tree of a PyTorch module's weights."""
    from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes, torch_to_flax

    tensors = [(name, value.numpy) for name, value in module.state_dict().items()]
    return torch_to_flax(tensors, param_shapes(flax_module), component, "module")


def write_tokenizer(folder, max_length=16):
    """A CLIP tokenizer of single characters and three words."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = letters + [f"{c}</w>" for c in letters]
    vocabulary += ["ca", "do", "cat</w>", "dog</w>", "on</w>"]
    vocabulary = {token: i for i, token in enumerate(vocabulary)}
    vocabulary |= {"<|startoftext|>": 97, "<|endoftext|>": 98}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\no n</w>\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer


SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """(directory, PyTorch pipeline) of a tiny SD 1.x with random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    root = tmp_path_factory.mktemp("tiny-sd")
    pipeline = StableDiffusionPipeline(
        unet=torch_unet(tiny_unet_config()),
        vae=torch_vae(tiny_vae_config()),
        text_encoder=torch_text(tiny_text_config()),
        tokenizer=write_tokenizer(root / "tokenizer"),
        scheduler=DDIMScheduler.from_config(SD1_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root)
    return root, pipeline


@pytest.fixture
def assert_parity():
    """max |ours - theirs| <= tolerance · max |theirs|; torch NCHW becomes NHWC."""

    def check(ours, theirs, tolerance=1e-4):
        theirs = theirs.detach().float().numpy()
        theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
        ours = np.asarray(ours, np.float32)
        assert ours.shape == theirs.shape
        assert np.isfinite(theirs).all()
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= tolerance, f"relative error {error:.2e}"

    return check


@pytest.fixture
def pytorch_here(monkeypatch):
    """`inspect --verify` runs PyTorch in this process, which has imported it already."""
    from hyperlora_jax.stable_diffusion import pytorch_forward, pytorch_parity

    def forward(root, part, inputs, variant):
        return pytorch_forward.forward(root, part, inputs, variant)

    monkeypatch.setattr(pytorch_parity, "_pytorch", forward)


XL_UNET = tiny_unet_config(
    block_out_channels=[8, 16, 32],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=[1, 2, 4],
    transformer_layers_per_block=[1, 1, 2],
    use_linear_projection=True,
    cross_attention_dim=24 + 32,
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=20 + 6 * 6,
)


def write_xl(root):
    """A tiny SDXL of random weights (32 pixels), saved by PyTorch diffusers; its pipeline."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    second = tiny_text_config(hidden_size=32, num_attention_heads=4, hidden_act="gelu")
    pipeline = StableDiffusionXLPipeline(
        unet=torch_unet(XL_UNET),
        vae=torch_vae(tiny_vae_config(scaling_factor=0.13025)),
        text_encoder=torch_text(tiny_text_config()),
        text_encoder_2=torch_text(second, seed=3, projection=True),
        tokenizer=write_tokenizer(root / "tokenizer"),
        tokenizer_2=write_tokenizer(root / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler.from_config(SD1_SCHEDULER, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root)
    return pipeline


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny-xl")
    return root, write_xl(root)
