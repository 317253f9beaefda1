import jax
import jax.numpy as jnp
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import (
    PRESETS,
    LoraSite,
    LoraSpec,
    component_tree,
    module_path,
    site_factors,
    spec_from_shapes,
    torch_path,
    tree_from_sites,
    validate,
)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a.0.b", ("a_0", "b")),
        (
            "down_blocks.0.attentions.12.transformer_blocks.0.attn1.to_out.0",
            ("down_blocks_0", "attentions_12", "transformer_blocks_0", "attn1", "to_out_0"),
        ),
        ("up_blocks.1.resnets.2.conv1", ("up_blocks_1", "resnets_2", "conv1")),
        ("time_embedding.linear_1", ("time_embedding", "linear_1")),
        ("mid_block.attentions.0.proj_in", ("mid_block", "attentions_0", "proj_in")),
        ("x.ff.net.0.proj", ("x", "ff", "net_0", "proj")),
    ],
)
def test_module_paths_have_an_inverse(path, parts):
    assert module_path(path) == parts
    if path != "a.0.b":
        assert torch_path(parts) == path


def kernels(**shapes):
    tree = {}
    for path, shape in shapes.items():
        node = tree
        for part in module_path(path.replace("__", ".")):
            node = node.setdefault(part, {})
        node["kernel"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        node["bias"] = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    return tree


MODEL = kernels(
    conv_in=(3, 3, 4, 8),
    time_embedding__linear_1=(8, 32),
    down_blocks__0__attentions__0__proj_in=(1, 1, 8, 8),
    down_blocks__0__attentions__0__transformer_blocks__0__attn1__to_q=(8, 8),
    down_blocks__0__attentions__0__transformer_blocks__0__attn2__to_k=(6, 8),
    down_blocks__0__attentions__0__transformer_blocks__0__attn2__to_v=(6, 8),
    down_blocks__0__attentions__0__transformer_blocks__0__attn2__to_out__0=(8, 8),
    down_blocks__0__attentions__0__transformer_blocks__0__ff__net__0__proj=(8, 64),
    down_blocks__0__resnets__0__conv1=(3, 3, 8, 8),
    down_blocks__0__downsamplers__0__conv=(3, 3, 8, 8),
)


def test_presets():
    counts = {name: len(spec_from_shapes(MODEL, name, 2)) for name in ("w2w", "attn-qkvo")}
    assert counts == {"w2w": 2, "attn-qkvo": 4}
    assert len(spec_from_shapes(MODEL, "attn-ff", 2)) == 6
    spec = spec_from_shapes(MODEL, "all", 2)
    assert len(spec) == 8
    assert spec.by_path["down_blocks.0.downsamplers.0.conv"].stride == (2, 2)
    assert spec.by_path["down_blocks.0.resnets.0.conv1"] == LoraSite(
        "down_blocks.0.resnets.0.conv1", 8, 8, 2, "conv", (3, 3), (1, 1)
    )
    assert spec_from_shapes(MODEL, [r"^conv_in$"], 2).sites[0].fan_in == 36
    assert "text" in PRESETS


def test_wrong_presets_are_named():
    with pytest.raises(UserError, match="preset 'attn' is unknown"):
        spec_from_shapes(MODEL, "attn", 2)
    with pytest.raises(UserError, match="matches no layer"):
        spec_from_shapes(MODEL, "text", 2)
    with pytest.raises(UserError, match="rank is 0"):
        spec_from_shapes(MODEL, "w2w", 0)


def test_a_spec_is_ordered_hashable_and_has_a_stable_fingerprint(spec):
    again = LoraSpec(tuple(reversed(spec.sites)))
    assert again == spec
    assert hash(again) == hash(spec)
    assert LoraSpec.from_json(spec.to_json()) == spec
    assert spec.fingerprint == again.fingerprint != spec.with_rank(2).fingerprint
    one = LoraSpec((LoraSite("a.to_q", 2, 3, 1),))
    # Stored in every dataset, checkpoint and file: a change here orphans them all.
    assert one.fingerprint.startswith("1db610a2bf2d501c")
    assert spec.num_parameters == 2 * 12 + 3 * 11 + 2 * (36 + 6)
    assert spec.max_rank == 3
    with pytest.raises(ValueError, match="named twice"):
        LoraSpec((*spec.sites, spec.sites[0]))
    with pytest.raises(UserError, match="expected the JSON of LoraSpec"):
        LoraSpec.from_json("[]")


def test_components_are_told_apart(spec):
    text = LoraSpec((LoraSite("text_encoder.text_model.encoder.layers.0.mlp.fc1", 4, 8, 1),))
    both = LoraSpec((*spec, *text))
    assert both.component("unet") == spec
    assert both.component("text_encoder") == text
    assert len(both.component("text_encoder_2")) == 0
    lora = factors.zeros(both)
    validate(component_tree(lora, "unet"), spec)
    assert list(component_tree(lora, "text_encoder")) == ["text_model"]
    assert component_tree(lora, "text_encoder_2") == {}


@pytest.mark.parametrize("num", [None, 3])
def test_validate_accepts_what_fits(spec, num):
    validate(factors.zeros(spec, num), spec)
    validate(jax.eval_shape(lambda: factors.zeros(spec, num)), spec)


def test_validate_names_the_site(spec):
    first = spec.sites[0]

    def changed(change):
        pairs = {site.path: dict(site_factors(factors.zeros(spec, 2), site)) for site in spec}
        change(pairs)
        return tree_from_sites(pairs)

    with pytest.raises(UserError, match=f"lacks 2 factors.*{first.path}.down"):
        validate(changed(lambda pairs: pairs.pop(first.path)), spec)
    with pytest.raises(UserError, match=r"2 factors that its spec does not name.*conv_in\.down"):
        validate(changed(lambda p: p.update({"conv_in": dict(p[first.path])})), spec)
    with pytest.raises(UserError, match=rf"{first.path}\.up: shape \(2, 9, 9\), expected"):
        validate(changed(lambda p: p[first.path].update(up=jnp.zeros((2, 9, 9)))), spec)
    with pytest.raises(UserError, match=r"batch \(3,\), elsewhere \(2,\)"):
        last = spec.sites[-1]
        shape = (3, *last.up_shape)
        validate(changed(lambda p: p[last.path].update(up=jnp.zeros(shape))), spec)
