from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hyperlora_jax.distill.prior import class_pictures
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.model import StableDiffusion

SECTION = {
    "prompts": ("a person", "a face"),
    "num_images": 5,
    "batch_size": 2,
    "num_steps": 3,
    "guidance": 2.0,
}


class Base(StableDiffusion):
    """Draws pictures that tell their prompt; counts what it is asked for."""

    base_hash = "b" * 64
    unet = SimpleNamespace(
        settings=SimpleNamespace(sample_size=(2, 2), in_channels=4, out_channels=4)
    )
    vae = SimpleNamespace(downsampling=2)

    def __init__(self):
        self.drawn = []

    def sample(self, key, prompts, num_steps, guidance):
        assert (num_steps, guidance) == (3, 2.0)
        self.drawn += prompts
        return np.stack([np.full((4, 4, 3), len(text), np.float32) for text in prompts])

    def encode_images(self, images):
        return images[:, ::2, ::2]

    def embed_prompts(self, prompts):
        states = np.stack([np.full((6, 7), len(text), np.float32) for text in prompts])
        return {"states": jnp.asarray(states)}


def test_every_prompt_in_turn_and_once(tmp_path):
    base, kept = Base(), tmp_path / "prior.npz"
    latents, text = class_pictures(base, ConfigDict(SECTION), 0, kept)
    assert latents.shape == (5, 2, 2, 3) and text["states"].shape == (5, 6, 7)
    lengths = [8, 6, 8, 6, 8]
    np.testing.assert_array_equal(latents[:, 0, 0, 0], lengths)
    np.testing.assert_array_equal(text["states"][:, 0, 0], lengths)
    assert len(base.drawn) == 6  # three full batches
    again = class_pictures(base, ConfigDict(SECTION), 0, kept)
    assert len(base.drawn) == 6
    np.testing.assert_array_equal(again[0], latents)
    np.testing.assert_array_equal(again[1]["states"], text["states"])
    class_pictures(base, ConfigDict(SECTION), 1, kept)
    assert len(base.drawn) == 12, "another seed draws others"


@pytest.mark.parametrize("wrong", [{"prompts": ()}, {"prompts": ("",)}, {"num_images": 0}])
def test_wrong_settings_are_named(tmp_path, wrong):
    with pytest.raises(UserError, match=r"distill\.prior: got prompts"):
        class_pictures(Base(), ConfigDict({**SECTION, **wrong}), 0, tmp_path / "prior.npz")
