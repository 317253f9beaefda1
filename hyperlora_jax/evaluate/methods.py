"""The methods of the comparison as samplers: each is "one LoRA per identity", drawn the same way.

base          no LoRA (a LoRA of zeros: the same compiled program as all others)
mean_lora     the mean of the training LoRAs' factors (they share one initialisation)
nearest       the training LoRA whose references are most like the reference
shuffled      the hypernetwork, given another identity's reference
generated     the hypernetwork
conventional  a LoRA fitted to all views of the identity
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hyperlora_jax.array_types import Float, Params
from hyperlora_jax.evaluate.compare import Method
from hyperlora_jax.evaluate.protocol import EvaluationSet
from hyperlora_jax.hypernet.model import Hypernetwork
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.parallel import sharding

LorasOf = Callable[[EvaluationSet], Params]


def sample_images(
    sd: Any,
    questions: EvaluationSet,
    loras: Params,
    strength: float,
    *,
    num_steps: int,
    guidance: float,
    identities_per_batch: int = 8,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "i c h w 3"]:
    """Pictures of the first i identities, one LoRA each, under their captions and noise.

    Args:
        loras: tree with leading axis i, at most the set's identities.
        mesh: where the model's parameters are (`sharding.on_mesh`); identities are shared out over
            its devices, in batches rounded up to a multiple of them.
    """
    count = int(jax.tree.leaves(loras)[0].shape[0])
    settings = sd.unet.settings
    noise = questions.first(count).noise((*settings.sample_size, settings.in_channels))
    size = min(identities_per_batch, count)
    place = functools.partial(jax.tree.map, jnp.asarray)
    if mesh is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        size = -(-size // shards) * shards
        place = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
    pictures = []
    for start in range(0, count, size):
        # The last batch is filled up with its own last identity: one program for all.
        rows = np.minimum(np.arange(start, start + size), count - 1)
        captions = [text for i in rows for text in questions.captions[i]]
        images = sd.sample(
            jax.random.key(0),
            captions,
            lora=place(jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], loras)),
            strength=strength,
            num_steps=num_steps,
            guidance=guidance,
            latents=place(np.asarray(noise[rows]).reshape(-1, *noise.shape[2:])),
        )
        images = np.asarray(images)
        pictures.append(images.reshape(size, -1, *images.shape[1:]))
    return np.concatenate(pictures)[:count]


def lora_method(
    name: str,
    sd: Any,
    loras_of: LorasOf,
    *,
    sampling: dict[str, Any],
    strengths: Sequence[float] = (1.0,),
    fingerprint: str = "",
) -> Method:
    """A method that is fully described by one LoRA per identity.

    `loras_of` is called once per evaluation set; it may serve the first identities only.
    """
    kept: dict[int, tuple[EvaluationSet, Params]] = {}

    def sample(questions: EvaluationSet, strength: float) -> np.ndarray:
        if id(questions) not in kept:
            kept[id(questions)] = (questions, jax.device_get(loras_of(questions)))
        return sample_images(sd, questions, kept[id(questions)][1], strength, **sampling)

    return Method(name, sample, tuple(strengths), fingerprint)


def fingerprint(*parts: Any) -> str:
    """Hex sha256 of numbers, strings and trees of arrays: what a method's pictures depend on."""
    digest = hashlib.sha256()
    for part in parts:
        for leaf in jax.tree.leaves(part):
            digest.update(leaf.tobytes() if hasattr(leaf, "tobytes") else repr(leaf).encode())
    return digest.hexdigest()


def generated_loras(hyper: Hypernetwork, references: Float[np.ndarray, "i h w 3"]) -> Params:
    """One LoRA per reference picture."""
    return jax.device_get(hyper.generate(jax.random.key(0), references))


def nearest_loras(
    hyper: Hypernetwork,
    references: Float[np.ndarray, "i h w 3"],
    train_references: Float[np.ndarray, "t v h w 3"],
    train_loras: Float[np.ndarray, "t d"],
    spec: LoraSpec,
) -> Params:
    """For every reference the training LoRA with the most similar mean embedding (cosine)."""
    count, views = train_references.shape[:2]
    flat = train_references.reshape(-1, *train_references.shape[2:])
    known = np.asarray(hyper.encoder.encode(flat)[0]).reshape(count, views, -1).mean(axis=1)
    asked = np.asarray(hyper.encoder.encode(references)[0])
    known /= np.linalg.norm(known, axis=1, keepdims=True) + 1e-9
    chosen = np.argmax(asked @ known.T, axis=1)
    return vectorize.unflatten(jnp.asarray(train_loras[chosen]), spec)
