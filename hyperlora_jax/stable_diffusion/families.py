"""Configs of the three families, for single files: they carry no config.json of their own."""

from typing import Any

_ATTENTION_DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
_ATTENTION_UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "eos_token_id": 2,
}
_OPEN_CLIP_H = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "eos_token_id": 2,
}
_OPEN_CLIP_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "eos_token_id": 2,
}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": _ATTENTION_DOWN,
    "up_block_types": _ATTENTION_UP,
    "layers_per_block": 2,
}
_UNET_XL = {
    **_UNET,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# Width of the text states, read from a cross-attention key projection, tells the family.
FAMILIES: dict[int, dict[str, dict[str, Any]]] = {
    768: {
        "unet": {**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768},
        "vae": _VAE,
        "text_encoder": _CLIP_L,
    },
    1024: {
        "unet": {
            **_UNET,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "cross_attention_dim": 1024,
        },
        "vae": _VAE,
        "text_encoder": _OPEN_CLIP_H,
    },
    2048: {
        "unet": _UNET_XL,
        "vae": {**_VAE, "scaling_factor": 0.13025, "sample_size": 1024},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_G,
    },
}
