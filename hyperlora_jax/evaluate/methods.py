"""Methods that draw with one LoRA per identity; which LoRAs, says `method_loras.py`.

Also how readers see all methods: titles, order in tables, which are controls.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hyperlora_jax.array_types import Float, Int, Json, Params
from hyperlora_jax.evaluate.compare import Method
from hyperlora_jax.evaluate.protocol import Questions
from hyperlora_jax.parallel import sharding, shared_work
from hyperlora_jax.stable_diffusion.model import StableDiffusion

TITLES = {
    "reference": "reference",
    "exact": "exact answer",
    "generated": "generated LoRA",
    "conventional": "conventional LoRA",
    "base": "base, no LoRA",
    "shuffled": "shuffled reference",
    "mean_lora": "mean LoRA",
    "nearest": "nearest LoRA",
    "copy_reference": "copied reference",
    "refined": "refined LoRA",
    "paper": "paper’s recipe",
    "linear_combination": "mixed training LoRAs",
    "ridge": "ridge regression",
    "knn": "nearest 20 LoRAs",
    "noisy_copy": "noisy copy of the nearest",
    "pca_gaussian": "random sample (PCA)",
}
# KIND_N: of the identity's first N views, or after N steps.
NUMBERED = {
    "generated": ("generated, {} picture{}", "in one pass, from as many of the pictures"),
    "conventional": ("conventional, {} picture{}", "fitted in the same way to as many pictures"),
    "refined": (
        "refined, {} step{}",
        "the generated LoRA after a few steps on the pictures that were shown of the subject",
    ),
}

ORDER = (
    "exact",
    "conventional",
    "refined_25",
    "refined",
    "generated",
    "paper",
    "conventional_1",
    "linear_combination",
    "ridge",
    "knn",
    "nearest",
    "noisy_copy",
    "pca_gaussian",
    "mean_lora",
    "shuffled",
    "base",
    "copy_reference",
)
CONTROLS = (
    "base", "mean_lora", "shuffled", "nearest", "knn", "ridge", "pca_gaussian", "noisy_copy",
    "conventional_1",
)  # fmt: skip

# What a reader must know of a method to read the pictures.
MEANINGS = {
    "exact": "what a perfect model would draw",
    "generated": "written by the hypernetwork in one pass, from the reference alone",
    "conventional": "fitted step by step to several pictures of the subject, as LoRAs usually are",
    "conventional_1": "fitted in the same way to the reference alone",
    "base": "the base model as it is",
    "shuffled": "written by the hypernetwork from somebody else’s reference",
    "mean_lora": "the average of all training LoRAs, the same for everybody",
    "nearest": "the training LoRA of the subject who looks most alike",
    "copy_reference": "the reference itself instead of a drawing",
}


def number_of(name: str) -> int | None:
    """N of a method's name KIND_N, at least 1; None for any other name."""
    kind, _, number = name.rpartition("_")
    counts = kind in NUMBERED and number.isascii() and number.isdigit() and number[0] != "0"
    return int(number) if counts else None


def title(name: str) -> str:
    """What a method is called in words."""
    if (number := number_of(name)) is not None:
        return NUMBERED[name.rpartition("_")[0]][0].format(number, "s" * (number > 1))
    return TITLES.get(name, name.replace("_", " "))


def method_order(names: Iterable[str]) -> list[str]:
    """Known methods in the order of tables, more pictures or steps first, then all others."""
    ours = [name for name in names if name in ORDER]
    ours += [name for name in names if number_of(name) is not None and name not in ORDER]

    def place(name: str) -> tuple[int, int]:
        number = number_of(name) or 0
        return ORDER.index(name if name in ORDER else name.rpartition("_")[0]), -number

    ordered = sorted(dict.fromkeys(ours), key=place)
    return ordered + [name for name in names if name not in ordered]


def meaning(name: str) -> str:
    """MEANINGS, of KIND_N too; "" where there is nothing to say."""
    if name not in MEANINGS and number_of(name) is not None:
        return NUMBERED[name.rpartition("_")[0]][1]
    return MEANINGS.get(name, "")


LorasOf = Callable[[Questions, float], Params]  # (evaluation set, guidance) -> [i] LoRAs


def sample_images(
    sd: StableDiffusion,
    questions: Questions,
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
        mesh: where the model's parameters are (`sharding.on_mesh`), of this process's devices;
            identities are shared out over processes and over these devices, in batches rounded up
            to a multiple of them.
    """
    count = int(jax.tree.leaves(loras)[0].shape[0])
    settings = sd.unet.settings
    noise = questions.first(count).noise((*settings.sample_size, settings.out_channels))
    shards, place = 1, functools.partial(jax.tree.map, jnp.asarray)
    if mesh is not None:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        place = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))

    def draw(wanted: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m c h w 3"]:
        size = -(-min(identities_per_batch, len(wanted)) // shards) * shards
        pictures = []
        for start in range(0, len(wanted), size):
            # The last batch is filled up with its own last identity: one program for all.
            rows = wanted[np.minimum(np.arange(start, start + size), len(wanted) - 1)]
            images = sd.sample(
                jax.random.key(0),
                [text for i in rows for text in questions.captions[i]],
                lora=place(jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], loras)),
                strength=strength,
                num_steps=num_steps,
                guidance=guidance,
                latents=place(np.asarray(noise[rows]).reshape(-1, *noise.shape[2:])),
            )
            images = np.asarray(images)
            pictures.append(images.reshape(size, -1, *images.shape[1:]))
        return np.concatenate(pictures)[: len(wanted)]

    return shared_work.shared_rows(count, draw)


def lora_method(
    name: str,
    sd: StableDiffusion,
    loras_of: LorasOf,
    *,
    sampling: Json,
    strengths: Sequence[float] = (1.0,),
    guidances: Sequence[float] = (1.0,),
    fingerprint: str = "",
) -> Method:
    """A method that is fully described by one LoRA per identity.

    `loras_of` is called once per evaluation set and guidance; it may serve the first identities
    only.
    """
    cached: dict[tuple[int, float], tuple[Questions, Params]] = {}

    def sample(questions: Questions, strength: float, guidance: float = 1.0) -> np.ndarray:
        key = (id(questions), guidance)
        if key not in cached:
            cached[key] = (questions, jax.device_get(loras_of(questions, guidance)))
        return sample_images(sd, questions, cached[key][1], strength, **sampling)

    return Method(name, sample, tuple(strengths), fingerprint, tuple(guidances))


def fingerprint(*parts: object) -> str:
    """Hex sha256 of numbers, strings and trees of arrays: what a method's pictures depend on."""
    digest = hashlib.sha256()
    for part in parts:
        for leaf in jax.tree.leaves(part):
            digest.update(leaf.tobytes() if hasattr(leaf, "tobytes") else repr(leaf).encode())
    return digest.hexdigest()
