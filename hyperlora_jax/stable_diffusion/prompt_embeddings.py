"""What a UNet is told about prompts: a tree of arrays by name, in each a row per prompt.

states     [b, n, e]   of the text encoders
pooled     [b, p]      SDXL: the state of the whole prompt
time_ids   [b, 6]      SDXL: the picture's height and width before its crop, the crop's top and
                       left, its height and width; float32, as bfloat16 takes 1023 for 1024
timestep_cond  [b, w]  of bases with a distilled guidance: its embedding
given      [b, hh, ww, c]  of inpainting and pix2pix bases: what follows the latents' channels
masks      [b, k, hh, ww]  of k regions: the arrays above but `given` then have k rows a picture
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Params
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.networks.unet_config import NUM_SIZES, UNetConfig

Text = Mapping[str, AnyArray]


def encode(sd: Any, prompts: Sequence[str], picture: tuple[int, int]) -> dict[str, Array]:
    """Embeddings of the prompts.

    Args:
        sd: a StableDiffusion.
        picture: (height, width) in pixels of the pictures, taken as whole and uncropped.
    """
    text = with_sizes(sd.embed_prompts(prompts), picture)
    return text | nothing_given(sd, len(prompts), picture)


def encode_nothing(sd: Any, picture: tuple[int, int]) -> dict[str, Array]:
    """Embeddings [1, …] of no prompt, as sampling with guidance takes it: the empty prompt, or
    zeros where an SDXL model says so (`force_zeros_for_empty_prompt`)."""
    text = sd.embed_prompts([""])
    if sd.is_xl and sd.zeros_for_no_prompt():
        text = jax.tree.map(jnp.zeros_like, text)
    return with_sizes(text, picture) | nothing_given(sd, 1, picture)


def nothing_given(sd: Any, num: int, picture: tuple[int, int]) -> dict[str, Array]:
    """ "given" of a base that takes a picture beside the noise, for `num` pictures drawn freely:
    an inpainting base is told that all is masked (1, and the latents of a grey picture), a pix2pix
    base gets zeros, as in its training without a picture. Nothing for other bases."""
    latents = sd.unet.settings.out_channels
    count = sd.unet.settings.in_channels - latents
    if not count:
        return {}
    size = (1, *(side // sd.component("vae").downsampling for side in picture))
    rows = jnp.zeros((*size, count))
    if count > latents:
        grey = sd.encode_images(jnp.full((1, *picture, 3), 0.5))
        rows = jnp.concatenate([jnp.ones((*size, 1)), grey], -1)
    return {"given": jnp.broadcast_to(rows, (num, *rows.shape[1:]))}


def with_sizes(text: Mapping[str, Array], picture: tuple[int, int]) -> dict[str, Array]:
    """What `StableDiffusion.embed_prompts` returns, with the time ids of whole pictures
    (height, width) where they are wanted."""
    if "pooled" not in text:
        return dict(text)
    sizes = jnp.asarray([*picture, 0, 0, *picture], jnp.float32)
    return {**text, "time_ids": jnp.broadcast_to(sizes, (len(text["pooled"]), NUM_SIZES))}


def row_shapes(settings: UNetConfig, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Shape of one prompt's row of every array."""
    shapes: dict[str, tuple[int, ...]] = {"states": (num_tokens, settings.context_width)}
    if settings.addition_time_width is not None:
        assert settings.addition_input_width
        pooled = settings.addition_input_width - NUM_SIZES * settings.addition_time_width
        shapes |= {"pooled": (pooled,), "time_ids": (NUM_SIZES,)}
    if given := settings.in_channels - settings.out_channels:
        shapes["given"] = (*settings.sample_size, given)
    return shapes


def apply_unet(
    unet: UNet,
    variables: Params,
    latents: Float[AnyArray, "b h w z"],
    timesteps: Int[AnyArray, " b"] | Float[AnyArray, " b"],
    text: Text,
) -> Float[Array, "b h w z"]:
    """The UNet's prediction."""
    added = None
    if "pooled" in text:
        added = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
    if "timestep_cond" in text:
        added = {**(added or {}), "timestep_cond": text["timestep_cond"]}
    if "given" in text:
        latents = jnp.concatenate([latents, text["given"].astype(latents.dtype)], -1)
    masks = text.get("masks")
    return cast(Array, unet.apply(variables, latents, timesteps, text["states"], added, masks))
