import jax
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, validate
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.lora_files.algebra import (
    extract,
    merge,
    merge_into_checkpoint,
)
from hyperlora_jax.lora_files.safetensors_io import read
from hyperlora_jax.lora_files.verify import load_modules, verify
from tests.lora_files.conftest import random_lora, spec_of
from tests.lora_files.test_round_trip import deltas

A = LoraSpec(
    (
        LoraSite("mid_block.attentions.0.proj_in", 8, 8, 2, "conv"),
        LoraSite("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 6, 8, 2),
        LoraSite("mid_block.resnets.0.conv1", 4, 8, 2, "conv", (3, 3)),
    )
)
B = LoraSpec((*A.with_rank(3).sites[:2], LoraSite("mid_block.resnets.0.conv2", 4, 4, 3)))


def assert_deltas(lora, wanted, tolerance=2e-5):
    validate(*lora)
    found = deltas(*lora)
    assert set(found) == set(wanted)
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=tolerance)


def test_a_merge_is_the_weighted_sum_and_keeps_single_sites():
    a, b = random_lora(A, 0), random_lora(B, 1)
    first, second = deltas(a, A), deltas(b, B)
    wanted = {path: 0.5 * value for path, value in first.items()}
    for path, value in second.items():
        wanted[path] = wanted.get(path, 0) - 2 * value
    merged = merge([(a, A), (b, B)], [0.5, -2.0])
    assert_deltas(merged, wanted)
    assert merged[1].by_path["mid_block.attentions.0.proj_in"].rank == 5
    assert merged[1].by_path["mid_block.resnets.0.conv2"].rank == 3
    short = merge([(a, A), (b, B)], [0.5, -2.0], rank=1)
    for path, value in wanted.items():
        left, sigma, right = np.linalg.svd(value, full_matrices=False)
        best = left[:, :1] * sigma[:1] @ right[:1]
        np.testing.assert_allclose(deltas(*short)[path], best, atol=2e-5)


def test_subtracting_itself_leaves_nothing():
    a = random_lora(A)
    zero = {path: 0 * value for path, value in deltas(a, A).items()}
    difference = merge([(a, A), (a, A)], [1.0, -1.0])
    assert_deltas(difference, zero)
    assert_deltas(merge([(a, A), (a, A)], [1.0, -1.0], 2), zero)


def test_a_higher_rank_changes_nothing():
    a = random_lora(A)
    lora = merge([(a, A)], [1.0], 5)
    assert lora[1] == A
    assert_deltas(lora, deltas(a, A))


def test_wrong_algebra_is_refused():
    a = random_lora(A)
    other = LoraSpec((LoraSite("mid_block.attentions.0.proj_in", 9, 8, 2, "conv"),))
    with pytest.raises(UserError, match="proj_in is conv 8→8 in one LoRA, conv 9→8 in other"):
        merge([(a, A), (random_lora(other), other)], [1.0, 1.0])
    with pytest.raises(UserError, match="1 LoRAs and 2 weights"):
        merge([(a, A)], [1.0, 1.0])


@pytest.fixture(scope="module")
def base(tmp_path_factory, sd1_modules):
    folder = tmp_path_factory.mktemp("base")
    for name, module in sd1_modules.items():
        module.save_pretrained(folder / name)
    return folder


def test_a_merged_checkpoint_equals_the_adapter_and_gives_the_lora_back(
    tmp_path, base, sd1_modules
):
    import torch

    spec = spec_of(sd1_modules, "all", rank=2)
    lora = random_lora(spec)
    tuned = merge_into_checkpoint(base, (factors.scale(lora, 0.5), spec), tmp_path / "tuned")
    before, after = load_modules(base), load_modules(tuned)
    found = extract(base, tuned, 2, "all")
    unet = spec.component("unet")
    assert found[1] == unet
    half = {path: 0.5 * value for path, value in deltas(lora, spec).items()}
    assert_deltas(found, {site.path: half[site.path] for site in unet}, 1e-4)
    text = extract(base, tuned, 2, "text", "text_encoder")
    assert_deltas(text, {s.path: half[s.path] for s in spec.component("text_encoder")}, 1e-4)
    path = save_lora(tmp_path / "half.safetensors", *merge([(lora, spec)], [0.5]), dtype="float32")
    assert verify(path, base).ok
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    states = torch.ones(1, 7, 24)
    with torch.no_grad():
        plain, merged = (m["unet"](x, 10, states).sample for m in (before, after))
        before["unet"].load_lora_adapter(read_torch(path), adapter_name="a", prefix="unet")
        adapted = before["unet"](x, 10, states).sample
    assert (adapted - merged).abs().max() < 2e-5
    assert (plain - merged).abs().max() > 1e-2
    for component in ("unet", "text_encoder"):
        names = [next((f / component).glob("*.safetensors")) for f in (base, tuned)]
        old, new = (read(name)[0] for name in names)
        assert {k: (v.dtype, v.shape) for k, v in old.items()} == {
            k: (v.dtype, v.shape) for k, v in new.items()
        }
    with pytest.raises(UserError, match="already exists"):
        merge_into_checkpoint(base, (lora, spec), tuned)


def read_torch(path):
    import torch

    from hyperlora_jax.lora_files import load_lora
    from hyperlora_jax.lora_files.writing import diffusers_tensors, normal_form

    lora, spec = load_lora(path)
    unet = spec.component("unet")
    tree = {name: node for name, node in lora.items() if name != "text_encoder"}
    tensors = diffusers_tensors(normal_form(tree, unet))
    return {name: torch.from_numpy(value) for name, value in tensors.items()}


def test_extract_and_merge_refuse_other_models(tmp_path, base):
    with pytest.raises(UserError, match="preset 'x' is unknown"):
        extract(base, base, 2, "x")
    with pytest.raises(UserError, match="matches no layer"):
        extract(base, base, 2, ["nothing"])
    lora = random_lora(A)
    with pytest.raises(UserError, match=r"has no layer .* of the LoRA's size"):
        merge_into_checkpoint(base, (lora, A), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    zero = extract(base, base, 2, "w2w")
    assert all(not leaf.any() for leaf in jax.tree.leaves(zero[0]))
