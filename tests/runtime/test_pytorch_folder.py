"""The PyTorch folder writes what JAX writes: every generator, every head, every encoder."""

import jax
import numpy as np
import pytest
import torch

from hyperlora_jax.lora import vectorize
from hyperlora_jax.runtime.generate_lora import LoraGenerator
from hyperlora_jax.runtime.pytorch_folder import write_pytorch
from tests.runtime.conftest import hypernetwork

CASES = {
    "regression": ("regression", {}, {}),
    "guided": ("regression", {}, {"guidance": 2.0}),
    "per token": ("regression", {"network": {"head": "per_token", "depth": 1}}, {}),
    "basis": ("regression", {"network": {"head": "basis", "basis_size": 5, "depth": 1}}, {}),
    "orthogonal": ("regression", {"network": {"head": "orthogonal", "basis_size": 30}}, {}),
    "adalora": ("regression", {"network": {"conditioning": "adalora", "adapter_rank": 3}}, {}),
    "learned": ("regression", {"network": {"down": "learned"}}, {}),
    "scan": ("regression", {"network": {"scan": True}}, {}),
    "iterative": ("iterative", {"network": {"down": "learned"}}, {"guidance": 1.5}),
    "x0": ("diffusion", {}, {"guidance": 1.5}),
    "x0 ancestral": ("diffusion", {}, {"sampler": "ancestral", "num_steps": 7}),
    "v": ("diffusion", {"diffusion": {"prediction": "v"}}, {"sampler": "ancestral"}),
    "flow": ("diffusion", {"diffusion": {"prediction": "flow"}}, {}),
    "flow ancestral": (
        "diffusion", {"diffusion": {"prediction": "flow"}}, {"sampler": "ancestral"},
    ),
    "mlp": ("diffusion", {"diffusion": {"denoiser": "mlp"}}, {"guidance": 1.5}),
    "latent": ("latent_diffusion", {"mlp": {"conditioning": "adalora"}}, {}),
    "mean": ("mean", {}, {"guidance": 2.0}),
    "nearest": ("nearest", {}, {}),
    "knn": ("knn", {}, {"guidance": 1.5}),
    "ridge": ("ridge", {}, {"guidance": 1.5}),
    "gaussian": ("pca_gaussian", {}, {"guidance": 1.5}),
}  # fmt: skip


def noise_of(hyper, key, count):
    """[l, 1 + s, z], as the generator draws it from a key."""
    generator, draw = hyper.generator, hyper.default_draw
    if not generator.stochastic:
        return None
    if not hasattr(generator, "codec"):
        return np.asarray(jax.random.normal(key, (count, len(hyper.constants["spread"]))))[:, None]
    first, steps = jax.random.split(key)
    shape = (count, generator.codec.size)
    keys = [first, *(jax.random.fold_in(steps, n) for n in range(draw.num_steps))]
    return np.stack([np.asarray(jax.random.normal(own, shape)) for own in keys], axis=1)


def exported(hyper, folder):
    write_pytorch(hyper, folder)
    return LoraGenerator(folder)


def both(hyper, pictures, folder):
    """Vectors [l, d] of JAX and of PyTorch, for the same noise."""
    key = jax.random.key(4)
    ours = vectorize.flatten(hyper.write(key, *hyper.embed(pictures)), hyper.spec)
    noise = noise_of(hyper, key, len(pictures))
    noise = None if noise is None else torch.from_numpy(noise)
    theirs, known = exported(hyper, folder)(torch.from_numpy(pictures), noise)
    np.testing.assert_allclose(known.numpy(), hyper.familiarity(pictures), atol=1e-6)
    return np.asarray(ours), theirs.detach().numpy()


def relative(ours, theirs):
    assert np.abs(ours - ours.mean(0)).max() > 0 or len(ours) == 1
    return np.abs(ours - theirs).max() / np.abs(ours).max()


@pytest.mark.parametrize("case", CASES)
def test_every_generator_writes_what_jax_writes(case, pictures, tmp_path):
    kind, model, draw = CASES[case]
    hyper = hypernetwork(kind, facts={"generate": {"num_steps": 4, **draw}}, **model)
    ours, theirs = both(hyper, pictures, tmp_path)
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    print(f"{case}: {difference:.1e}")
    assert difference < 1e-5
    if kind not in ("mean", "pca_gaussian"):
        assert np.abs(ours[0] - ours[1]).max() > 1e-3
