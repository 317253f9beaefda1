import jax
import numpy as np
import pytest

from hyperlora_jax.lora import factors, vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("num", [None, 1, 3])
def test_round_trips_are_exact(spec, random_lora, num):
    lora = random_lora(num)
    vector = vectorize.flatten(lora, spec)
    assert vector.shape == ((spec.num_parameters,) if num is None else (num, spec.num_parameters))
    assert_same(vectorize.unflatten(vector, spec), lora)
    assert_same(vectorize.untokens(vectorize.tokens(lora, spec), spec), lora)


def test_the_flat_order_is_that_of_sorted_peft_keys(spec, random_lora):
    lora = random_lora()
    state = {}
    for site in spec:
        pair = site_factors(lora, site)
        name = f"base_model.model.{site.path}"
        order = (1, 0) if site.kind == "linear" else (3, 2, 0, 1)
        state[f"{name}.lora_A.weight"] = pair["down"].transpose(order)
        state[f"{name}.lora_B.weight"] = pair["up"].T
    wanted = np.concatenate([state[name].ravel() for name in sorted(state)])
    np.testing.assert_array_equal(vectorize.flatten(lora, spec), wanted)


def test_the_token_table_describes_every_token(spec, random_lora):
    lora = random_lora()
    table = vectorize.token_table(spec)
    values = vectorize.tokens(lora, spec)
    assert list(values) == list(table.buckets) == sorted(values)
    assert table.num_tokens == 2 * sum(site.rank for site in spec)
    for width, bucket in table.buckets.items():
        assert values[width].shape == (len(bucket.site), width)
        for row, token in enumerate(values[width]):
            site = spec.sites[bucket.site[row]]
            pair = site_factors(lora, site)
            component = bucket.component[row]
            if bucket.side[row] == vectorize.DOWN:
                wanted = pair["down"].reshape(site.fan_in, site.rank)[:, component]
            else:
                wanted = pair["up"][component]
            np.testing.assert_array_equal(token, wanted)
            projection = table.projections[bucket.projection[row]]
            assert site.path.endswith(projection)
            assert site.path.startswith(table.blocks[bucket.block[row]])
    assert table.kinds == ("attn1", "attn2", "other")


def test_w2w_at_rank_one_has_one_token_for_each_matrix():
    block = "mid_block.attentions.0.transformer_blocks.0."
    spec = LoraSpec(tuple(LoraSite(f"{block}attn{k}.to_{p}", 4, 4, 1) for k in "12" for p in "qv"))
    assert vectorize.token_table(spec).num_tokens == 8
    assert vectorize.token_table(spec) is vectorize.token_table(spec)


def test_wrong_sizes_are_refused(spec, random_lora):
    with pytest.raises(ValueError, match="5 numbers, spec has"):
        vectorize.unflatten(np.zeros(5, np.float32), spec)
    more = {width: np.concatenate([rows, rows[:1]]) for width, rows in
            vectorize.tokens(random_lora(), spec).items()}  # fmt: skip
    with pytest.raises(ValueError, match="left over"):
        vectorize.untokens(more, spec)


def test_whitening_has_an_inverse_and_unit_spread(spec, random_lora):
    lora = random_lora(16)
    stats = vectorize.whitening(lora)
    white = vectorize.whiten(lora, stats)
    for leaf in jax.tree.leaves(white):
        assert abs(float(leaf.std()) - 1) < 1e-3
        np.testing.assert_allclose(leaf.mean(0), 0, atol=1e-5)
    back = vectorize.unwhiten(white, stats)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, lora)
    same = vectorize.whitening(factors.repeat(factors.index(lora, 0), 4))
    assert all(float(std) == 1.0 for std in jax.tree.leaves(same.std))
