"""The token hypernetwork on a small mixed spec: layout, zero start, heads, save and restore."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora_jax.encoders import condition_encoders
from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet.building import build_generator, build_network
from hyperlora_jax.hypernet.condition import Condition, merge_references
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.hypernet.token_layout import assemble, disassemble, make_layout, token_features
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, validate

SPEC = LoraSpec(
    (
        LoraSite("down_blocks.0.attentions.0.proj.attn1.to_q", 8, 8, 2, "linear"),
        LoraSite("down_blocks.0.attentions.0.proj.attn2.to_k", 6, 8, 2, "linear"),
        LoraSite("down_blocks.0.resnets.0.conv1", 4, 8, 2, "conv", (3, 3)),
    )
)
SMALL = {"width": 16, "depth": 1, "num_heads": 2}


def random_lora(key, num_loras=3):
    lora = factors.init(key, SPEC, num_loras)
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


@pytest.mark.parametrize("components", [1, 2, None])
def test_tokens_hold_every_number_once(components):
    layout = make_layout(SPEC, components)
    lora = random_lora(jax.random.key(0))
    back = assemble(layout, disassemble(layout, lora))
    validate(back, SPEC)
    jax.tree.map(np.testing.assert_array_equal, back, lora)
    assert layout.num_tokens == 2 * 3 * (2 // (components or 2))
    assert all(len(ids) == layout.num_tokens for ids in token_features(layout).values())


def test_gradient_of_assembling_pads_nothing():
    """Slices, one by one, would have gradients of the whole group's size each."""
    spec = LoraSpec(tuple(LoraSite(f"a.{k}.to_q", 4, 4, 2, "linear") for k in range(9)))
    layout = make_layout(spec)
    outputs = [jnp.ones((3, 9, 2, 4)) for _ in layout.groups]

    def total(outputs):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(assemble(layout, outputs)))

    program = str(jax.make_jaxpr(jax.grad(total))(outputs))
    assert "concatenate" in program
    assert "pad[" not in program


def test_components_must_divide_the_rank():
    with pytest.raises(ValueError, match="rank 2 is no multiple of components=3"):
        make_layout(SPEC, 3)


@pytest.mark.parametrize("head", ["dense", "per_token", "basis", "orthogonal"])
@pytest.mark.parametrize("down", ["generated", "learned"])
def test_starts_at_the_base_and_learns_from_the_condition(head, down):
    net = build_network(SPEC, {**SMALL, "head": head, "down": down, "basis_size": 4})
    key = jax.random.key(1)
    pooled, tokens = jax.random.normal(key, (2, 5)), jax.random.normal(key, (2, 3, 5))
    given = Condition(pooled, tokens)
    params = jax.jit(net.init)(key, given)["params"]
    apply = jax.jit(lambda params: net.apply({"params": params}, given))
    lora = apply(params)
    validate(lora, SPEC)
    deltas = jax.tree.leaves(jax.tree.map(factors.delta, lora, is_leaf=factors.is_site))
    assert all(not np.any(delta) for delta in deltas)

    @jax.jit
    def moved(params):
        def size(params):
            lora = net.apply({"params": params}, given)
            return sum(jnp.sum(leaf**2) + jnp.sum(leaf) for leaf in jax.tree.leaves(lora))

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(size)(params))

    lora = apply(moved(moved(params)))
    ups = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(lora) if "up" in str(path)]
    assert any(np.abs(up[0] - up[1]).max() > 1e-6 for up in ups), "the condition has no effect"


@pytest.mark.parametrize("conditioning_kind", ["adanorm", "adalora"])
def test_scan_equals_unrolled(conditioning_kind):
    settings = {**SMALL, "depth": 2, "conditioning": conditioning_kind}
    unrolled, scanned = (build_network(SPEC, {**settings, "scan": s}) for s in (False, True))
    key = jax.random.key(2)
    pooled, tokens = jax.random.normal(key, (1, 5)), jax.random.normal(key, (1, 3, 5))
    given = Condition(pooled, tokens, jnp.asarray([[True, True, False]]))
    params = jax.jit(unrolled.init)(key, given)["params"]
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    blocks = params["backbone"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), blocks["block_0"], blocks["block_1"])
    other = {**params, "backbone": {"blocks": stacked}}
    first = jax.jit(unrolled.apply)({"params": params}, given)
    second = jax.jit(scanned.apply)({"params": other}, given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, second)


def test_unknown_setting_is_named():
    with pytest.raises(UserError, match=r"config\.model\.network: .*widht"):
        build_network(SPEC, {"widht": 3})


@pytest.fixture(name="hyper", scope="module")
def _hyper():
    module = ConvEncoder(image_size=8, widths=(8, 8), embedding_dim=8, pool_channels=4)
    params = init_encoder(module, jax.random.key(3))
    encoder = condition_encoders.FlaxImageEncoder(
        "e", module, params, condition_encoders.tree_hash(params)
    )
    model = {"generator": "regression", "network": SMALL}
    generator = build_generator(SPEC, model)
    pooled, tokens = encoder.encode(jnp.zeros((1, 8, 8, 3)))
    weights = jax.jit(generator.init)(jax.random.key(4), Condition(pooled, tokens))
    weights = jax.tree.map(lambda leaf: leaf + 0.1, weights)
    return Hypernetwork(generator, weights, encoder, {"base_hash": "b", "base": "x"}, model)


def test_restored_generates_the_same(hyper, tmp_path):
    hyper.save(tmp_path / "hypernetwork")
    restored = Hypernetwork.restore(tmp_path)
    pictures = jax.random.uniform(jax.random.key(5), (2, 3, 8, 8, 3))
    key = jax.random.key(0)
    first, second = hyper.generate(key, pictures), restored.generate(key, pictures)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    single = hyper.generate(key, pictures[:, 0])
    same = hyper.generate(key, pictures[:, :1])
    jax.tree.map(np.testing.assert_array_equal, single, same)


def test_references_that_are_not_given_do_not_count(hyper):
    key = jax.random.key(8)
    pooled, tokens = jax.random.normal(key, (2, 3, 8)), jax.random.normal(key, (2, 3, 4, 8))
    given = jnp.asarray([[True, True, False], [True, False, False]])
    apply = jax.jit(hyper.generator.net.apply)
    lora = apply({"params": hyper.params}, merge_references(pooled, tokens, given))
    for row, count in enumerate((2, 1)):
        alone = merge_references(pooled[row : row + 1, :count], tokens[row : row + 1, :count])
        wanted = apply({"params": hyper.params}, alone)
        for ours, theirs in zip(jax.tree.leaves(lora), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-4, atol=1e-5)


def test_bad_checkpoints_are_named(hyper, tmp_path):
    with pytest.raises(UserError, match="missing: does not exist"):
        Hypernetwork.restore(tmp_path / "missing")
    hyper.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        Hypernetwork.restore(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    hyper.save(tmp_path / "again")
    for text in ('{"format": "other"}', "[]"):
        (tmp_path / "again" / "config.json").write_text(text)
        with pytest.raises(UserError, match="is of format"):
            Hypernetwork.restore(tmp_path / "again")


def test_constants_and_defaults_are_kept(hyper, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, SPEC.num_parameters)).astype(np.float32)
    model = {"generator": "pca_gaussian", "baseline": {"num_components": 3}}
    generator = build_generator(SPEC, model)
    constants = generator.fit(np.zeros((5, 8)), vectors)
    facts = {**hyper.facts, "generate": {"format": "kohya", "guidance": 0.5}}
    Hypernetwork(generator, {}, hyper.encoder, facts, model, constants).save(tmp_path)
    restored = Hypernetwork.restore(tmp_path)
    assert restored.default_draw.guidance == 0.5
    pictures = jax.random.uniform(jax.random.key(5), (2, 8, 8, 3))
    loras = restored.generate(jax.random.key(0), pictures, num_samples=3)
    assert factors.num_loras(loras) == 6
    full = restored.generate(jax.random.key(0), pictures, num_samples=3, guidance=1.0)
    mean = restored.generate(jax.random.key(0), pictures, num_samples=3, guidance=0.0)
    jax.tree.map(
        lambda half, one, zero: np.testing.assert_allclose(half, (one + zero) / 2, atol=1e-5),
        loras, full, mean,
    )  # fmt: skip
    with pytest.raises(UserError, match="writes the same LoRA every time; expected 1"):
        hyper.generate(jax.random.key(0), pictures, num_samples=2)
