"""Several LoRAs and prompts in one picture; guidance with LoRAs on one branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.diffusion.samplers import SAMPLERS
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.region_shares import pyramid
from hyperlora_jax.lora.sites import component_tree, spec_from_shapes
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.stable_diffusion.networks import layers
from hyperlora_jax.stable_diffusion.networks.attention import Attention
from hyperlora_jax.stable_diffusion.networks.unet import unet_from_config
from hyperlora_jax.stable_diffusion.picture_regions import Region, lay_out
from hyperlora_jax.stable_diffusion.prompt_embeddings import apply_unet
from hyperlora_jax.stable_diffusion.weights.flax_trees import init_params

from .conftest import tiny_unet_config


@pytest.fixture(scope="module")
def base():
    unet = unet_from_config(tiny_unet_config())
    return unet, init_params(unet, jax.random.key(0)), jax.jit(unet.apply)


@pytest.fixture(name="sd", scope="module")
def _sd():
    return load_base("tiny-sd")


def draw(spec, num=None, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32),
        factors.zeros(spec, num),
    )


def inputs(rows, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 7, 8, 4)).astype(np.float32)
    context = rng.standard_normal((rows, 5, 24)).astype(np.float32)
    return x, np.array([300]), context


def test_one_lora_everywhere_is_the_plain_lora_and_others_do_not_count(base):
    """All kinds of layers, an odd height; a share of zero is no share, equal LoRAs are one."""
    _, params, apply = base
    spec = spec_from_shapes(params, "all", 3)
    two, random = draw(spec, 2, size=0.1), np.random.default_rng(1)
    x, t, texts = inputs(2)
    alone = {"params": params, "lora": factors.index(two, slice(0, 1))}
    plain = apply(alone, x, t, texts[:1])
    scale = np.abs(plain).max()
    first = np.stack([np.ones((1, 7, 8)), np.zeros((1, 7, 8))], 1).astype(np.float32)
    everywhere = apply({"params": params, "lora": two}, x, t, texts, None, first)
    np.testing.assert_allclose(everywhere, plain, atol=2e-6 * scale)  # sums in another order
    share = random.random((1, 1, 7, 8)).astype(np.float32)
    soft = np.concatenate([share, 1 - share], 1)
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[0]]), two)
    shared = apply({"params": params, "lora": same}, x, t, texts[[0, 0]], None, soft)
    np.testing.assert_allclose(shared, plain, atol=2e-6 * scale)
    mixed = apply({"params": params, "lora": two}, x, t, texts, None, soft)
    assert np.abs(mixed - plain).max() > 0.1 * scale


def test_a_region_changes_no_position_outside_of_it():
    """Dense, 3 × 3 and strided convolutions: outside, what the base computes, to the last bit."""
    random = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    x = drawn(1, 6, 6, 3)
    masks = np.zeros((1, 2, 6, 6), np.float32)
    masks[:, 0, :, :2] = 1.0
    masks[:, 1] = 1.0 - masks[:, 0]
    regions = pyramid(jnp.asarray(masks), 2)
    for module, shape, step in (
        (layers.Dense(5), (3,), 1),
        (layers.Conv(5), (3, 3, 3), 1),
        (layers.Conv(5, stride=2), (3, 3, 3), 2),
    ):
        params = {"kernel": drawn(*shape, 5), "bias": drawn(5)}
        lora = {"down": drawn(2, *shape, 2), "up": drawn(2, 2, 5)}
        lora["up"] = lora["up"].at[1].set(0.0)
        variables = {"params": params, "lora": lora}
        plain, changed = module.apply({"params": params}, x), module.apply(variables, x, regions)
        border = 2 // step
        np.testing.assert_array_equal(changed[:, :, border:], plain[:, :, border:])
        assert (np.abs(changed - plain)[:, :, :border].max(-1) > 0).all()


def test_positions_attend_to_the_text_of_their_region_and_apart_to_no_other(base):
    random = np.random.default_rng(0)
    attention = Attention(2)
    x, texts = (
        jnp.asarray(random.standard_normal((k, n, 8)), jnp.float32) for k, n in ((1, 4), (2, 3))
    )
    masks = jnp.asarray([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])
    variables = attention.init(jax.random.key(0), x)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), variables
    )
    crossed = attention.apply(variables, x, texts, pyramid(masks, 1))
    within = attention.apply(variables, x, None, pyramid(masks, 1, apart=True))
    for k, part in enumerate((slice(0, 2), slice(2, 4))):
        own = attention.apply(variables, x, texts[k : k + 1])
        np.testing.assert_allclose(crossed[:, part], own[:, part], rtol=1e-5, atol=1e-5)
        alone = attention.apply(variables, x[:, part])
        np.testing.assert_allclose(within[:, part], alone, rtol=1e-5, atol=1e-5)


def test_convolutions_of_regions_apart_are_those_of_each_alone():
    """Zeros beyond a region on both sides of a border, in every kind of convolution; one of stride
    2 looks to the left alone."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((1, 4, 8, 3)), jnp.float32)
    masks = np.zeros((1, 2, 4, 8), np.float32)
    masks[:, 0, :, :4], masks[:, 1, :, 4:] = 1.0, 1.0
    regions = pyramid(jnp.asarray(masks), 2, apart=True)
    for module, step in ((layers.Conv(5), 1), (layers.Conv(5, stride=2), 2)):
        shapes = {"kernel": (3, 3, 3, 5), "down": (2, 3, 3, 3, 2), "up": (2, 2, 5), "bias": (5,)}
        drawn = {k: jnp.asarray(random.standard_normal(n), jnp.float32) for k, n in shapes.items()}
        lora = {name: drawn.pop(name) for name in ("down", "up")}
        apart = module.apply({"params": drawn, "lora": lora}, x, regions)
        for k in range(2):
            own = {name: leaf[k] for name, leaf in lora.items()}
            alone = module.apply({"params": drawn, "lora": own}, x[:, :, 4 * k : 4 * k + 4])
            width = 4 // step
            half = apart[:, :, width * k : width * (k + 1)]
            np.testing.assert_allclose(half, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_regions_apart_are_what_each_is_alone(base):
    """All layers, LoRAs in each; the border at 8 columns stays one at every level. So a base sees
    zeros beyond a region, as beyond a picture's edge, on both sides of a border."""
    unet, params, apply = base
    lora, random = draw(spec_from_shapes(params, "all", 3), 2, size=0.1), np.random.default_rng(2)
    x = random.standard_normal((1, 8, 16, 4)).astype(np.float32)
    _, t, texts = inputs(2)
    masks = np.zeros((1, 2, 8, 16), np.float32)
    masks[:, 0, :, :8], masks[:, 1, :, 8:] = 1.0, 1.0
    variables = {"params": params, "lora": lora}
    apart = jax.jit(unet.clone(apart=True).apply)(variables, x, t, texts, None, masks)
    for k, part in enumerate((slice(0, 8), slice(8, 16))):
        own = {"params": params, "lora": factors.index(lora, slice(k, k + 1))}
        alone = apply(own, x[:, :, part], t, texts[k : k + 1])
        scale = np.abs(alone).max()
        np.testing.assert_allclose(apart[:, :, part], alone, atol=1e-5 * scale)


def test_norms_of_regions_apart_are_those_of_each_alone():
    random = np.random.default_rng(0)
    norm, x = layers.GroupNorm(2), jnp.asarray(random.standard_normal((1, 2, 4, 4)), jnp.float32)
    masks = np.zeros((1, 2, 2, 4), np.float32)
    masks[:, 0, :, :1], masks[:, 1, :, 1:] = 1.0, 1.0
    variables = {"params": {"scale": jnp.full(4, 2.0), "bias": jnp.ones(4)}}
    together = norm.apply(variables, x, pyramid(jnp.asarray(masks), 1, apart=True))
    for part in (slice(0, 1), slice(1, 4)):
        alone = norm.apply(variables, x[:, :, part])
        np.testing.assert_allclose(together[:, :, part], alone, rtol=1e-5, atol=1e-5)
    shared = norm.apply(variables, x, pyramid(jnp.asarray(masks), 1))
    np.testing.assert_array_equal(shared, norm.apply(variables, x))


def test_places_become_masks_that_add_up_to_one(sd, tmp_path):
    def masks(*places, batch=1):
        regions = [Region(place) for place in places]
        return lay_out(regions, sd, ["a"] * batch, (4, 8)).masks

    left, right = masks("left", "right")[0]
    assert left[:, :4].all() and not left[:, 4:].any() and (left + right == 1).all()
    box = masks("0.0625,0,0.5,0.5")[0]
    assert box.shape == (2, 4, 8) and box[0, 0].tolist() == [0.5, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(box.sum(0), np.ones((4, 8)))
    both = masks("all", "left")[0]
    assert (both[:, :, :4] == 0.5).all() and (both[0, :, 4:] == 1).all()
    picture = np.zeros((8, 16), np.uint8)
    picture[:, 8:] = 255
    Image.fromarray(picture).save(tmp_path / "right.png")
    np.testing.assert_array_equal(masks(tmp_path / "right.png")[0, 0], right)
    each = np.stack([left, right])
    np.testing.assert_array_equal(masks(each, batch=2)[:, 0], each)


@pytest.mark.parametrize(
    "region, message",
    [
        (Region("0,0,1"), r"region 0,0,1: expected a box x0,y0,x1,y1"),
        (Region("0.5,0,0.2,1"), r"expected a box x0,y0,x1,y1"),
        (Region("middle"), r"region 'middle': expected all, left, right"),
        (Region(np.zeros((4, 8))), "covers nothing"),
        (Region(np.full((4, 8), 2.0)), "a mask from 2 to 2, expected numbers in"),
        (Region(np.ones((3, 4, 8))), r"a mask of shape \[3, 4, 8\], expected"),
        (Region("left", prompt=["a", "b"]), "2 prompts, expected one, or 1"),
        (Region("left", ["nowhere.safetensors"]), "nowhere.safetensors"),
    ],
)
def test_wrong_regions_are_named(region, message, sd):
    with pytest.raises(UserError, match=message):
        lay_out([region], sd, ["a"], (4, 8))


def test_sampling_with_regions(sd):
    spec = sd.lora_spec("all", 2)
    several = draw(spec, 2, size=0.1)
    options = {"num_steps": 1, "guidance": 2.0}
    plain = sd.sample(0, ["a", "b"], lora=several, **options)
    whole = sd.sample(0, ["a", "b"], regions=[Region("all", several)], **options)
    np.testing.assert_allclose(whole, plain, atol=1e-5)
    base = sd.sample(0, ["a", "b"], **options)
    nothing = [Region("left", several, strength=0.0), Region("0,0,1,0.5")]
    np.testing.assert_allclose(
        sd.sample(0, ["a", "b"], regions=nothing, **options), base, atol=1e-5
    )
    assert np.abs(plain - base).max() > 0.05
    with pytest.raises(UserError, match="found lora and regions"):
        sd.sample(0, "a", lora=several, regions=nothing)
    with pytest.raises(UserError, match="apart: found no regions"):
        sd.sample(0, "a", apart=True)
    with pytest.raises(UserError, match="lora_branches is 'none', expected one of"):
        sd.sample(0, "a", lora_branches="none")


def test_loras_on_the_conditional_branch_only(sd):
    """As two passes of the UNet: the base on the negative prompt, the LoRA on the prompt."""
    spec, guidance, prompts = sd.lora_spec("attn-qkvo", 2), 2.5, ["a", "b"]
    lora = draw(spec, 2, size=0.2)
    noise = sd.noise(0, 2)
    both, negative = (sd.embed_prompts(texts, None) for texts in (prompts, ["", ""]))

    def denoise(x, t):
        plain = {"params": sd.params["unet"]}
        changed = {**plain, "lora": component_tree(lora, "unet")}
        base = apply_unet(sd.unet, plain, x, t, negative)
        return base + guidance * (apply_unet(sd.unet, changed, x, t, both) - base)

    latents = SAMPLERS["ddim"](denoise, sd.schedule, noise, 1, None)
    found = sd.sample(
        0, prompts, lora=lora, num_steps=1, guidance=guidance, latents=noise, sampler="ddim",
        lora_branches="conditional",
    )  # fmt: skip
    np.testing.assert_allclose(found, sd.decode_latents(latents), atol=1e-5)
