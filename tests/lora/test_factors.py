import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import site_factors, validate


def deltas(lora, spec):
    return {site.path: np.asarray(factors.delta(site_factors(lora, site))) for site in spec}


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize("num", [None, 4])
def test_init_is_the_base_and_depends_on_the_path_only(spec, num):
    key = jax.random.key(1)
    lora = factors.init(key, spec, num)
    validate(lora, spec)
    assert factors.num_loras(lora) == num
    assert all(not value.any() for value in deltas(lora, spec).values())
    fewer = type(spec)(spec.sites[1:])
    same = site_factors(factors.init(key, fewer, num), spec.sites[2])["down"]
    np.testing.assert_array_equal(same, site_factors(lora, spec.sites[2])["down"])


def test_shared_init_gives_every_lora_the_same_down(spec):
    lora = factors.init(jax.random.key(1), spec, 3, down_std=1.0, shared=True)
    validate(lora, spec)
    down = site_factors(lora, spec.sites[0])["down"]
    np.testing.assert_array_equal(down[0], down[2])
    assert 0.3 < float(down.std()) < 3


def test_delta_has_the_layout_of_the_kernel(spec, random_lora):
    single, batch = random_lora(), random_lora(3)
    for site in spec:
        shape = (*site.down_shape[:-1], site.out_features)
        assert factors.delta(site_factors(single, site)).shape == shape
        pair = site_factors(batch, site)
        whole = factors.delta(pair)
        assert whole.shape == (3, *shape)
        one = factors.delta({side: value[1] for side, value in pair.items()})
        np.testing.assert_allclose(whole[1], one, atol=1e-5)


def test_scale_stack_index(spec, random_lora):
    batch = random_lora(3)
    scaled = factors.scale(batch, jnp.array([0.0, 1.0, -2.0]))
    for i, strength in enumerate([0.0, 1.0, -2.0]):
        single = factors.index(batch, i)
        wanted = {name: strength * value for name, value in deltas(single, spec).items()}
        assert_close(deltas(factors.index(scaled, i), spec), wanted)
        assert_close(deltas(factors.scale(single, strength), spec), wanted)
    again = factors.stack([factors.index(batch, i) for i in range(3)])
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    assert factors.num_loras(factors.index(batch, slice(0, 2))) == 2
    assert factors.num_loras(factors.repeat(factors.index(batch, 0), 5)) == 5
    with pytest.raises(ValueError, match="2 strengths, but 3 LoRAs"):
        factors.scale(batch, jnp.ones(2))
    with pytest.raises(ValueError, match="at least one site"):
        factors.num_loras({})


def test_padded_stack_keeps_every_delta(spec):
    """The second LoRA has other ranks and lacks a site of the first; and the other way round."""
    specs = spec.with_rank(5), type(spec)(spec.sites[1:]).with_rank(2)
    loras = [
        jax.tree.map(
            lambda leaf, k=k: np.random.default_rng(k).standard_normal(leaf.shape, np.float32),
            factors.zeros(own),
        )
        for k, own in enumerate(specs)
    ]
    for order in ((0, 1), (1, 0)):
        stacked = factors.stack_padded([loras[k] for k in order])
        validate(stacked, specs[0])
        together = deltas(stacked, specs[0])
        for place, k in enumerate(order):
            alone = deltas(loras[k], specs[k])
            for path, delta in together.items():
                np.testing.assert_allclose(delta[place], alone.get(path, 0.0), atol=1e-5)


@pytest.mark.parametrize("num", [None, 2])
def test_concatenated_ranks_add_deltas(spec, random_lora, num):
    a, b = random_lora(num, 0), random_lora(num, 1)
    both = deltas(factors.concatenate_ranks(a, b), spec)
    first, second = deltas(a, spec), deltas(b, spec)
    assert_close(both, {name: first[name] + second[name] for name in both})
    only = {"mid_block": {"proj": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}}
    assert set(factors.concatenate_ranks(a, only)) == {"down_blocks_0", "mid_block"}
