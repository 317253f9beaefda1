"""Class pictures for prior preservation: what the base itself draws for "a photo of a person".

A fit on a few pictures of one subject pulls the whole class towards it; a second loss on pictures
that the base made of the class holds it back (DreamBooth, arXiv 2208.12242, section 3.2).
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from hyperlora_jax import storage
from hyperlora_jax.distill.slots import ConceptArrays
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.embedded import image_size
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.subjects.encoded_subjects import encode_in_batches, texts_by

LAYOUT = 2  # of the file


def class_pictures(
    sd: StableDiffusion, section: ConfigDict, seed: int, cache: Path
) -> ConceptArrays:
    """(latents, prompt embeddings) of pictures that the base draws; made once and kept in a file.

    Args:
        section: `prompts` (drawn in turn), `num_images`, `batch_size`, `num_steps`, `guidance`.
        seed: of the start noise.
        cache: .npz file; that of other settings is drawn again.

    Raises:
        UserError: no prompt, fewer than one image.
    """
    prompts, count = list(section.prompts), section.num_images
    if not prompts or not all(prompts) or count < 1:
        raise UserError(
            f"distill.prior: got prompts {prompts} and num_images {count}, expected at least one "
            "prompt and one image"
        )
    facts = repr((LAYOUT, sorted(section.to_dict().items()), seed, sd.base_hash))
    if cache.exists():
        with np.load(cache, allow_pickle=False) as file:
            if str(file["facts"]) == facts:
                names = [name for name in file.files if name not in ("latents", "facts")]
                return file["latents"], {name: file[name] for name in names}
    texts = [prompts[k % len(prompts)] for k in range(count)]
    latents = _latents(sd, section, texts, seed)
    size = image_size(sd)
    encoded = encode_in_batches(texts_by(sd, (size, size)), prompts, section.batch_size, None)
    rows = np.arange(count) % len(prompts)
    text = {name: np.asarray(array, np.float32)[rows] for name, array in encoded.items()}
    content = io.BytesIO()
    arrays: dict[str, Any] = {"latents": latents, **text, "facts": np.array(facts)}
    np.savez(content, **arrays)
    storage.replaced(cache, content.getvalue())
    return latents, text


def _latents(
    sd: StableDiffusion, section: ConfigDict, texts: Sequence[str], seed: int
) -> np.ndarray:
    size = min(section.batch_size, len(texts))
    parts = []
    for start in tqdm(range(0, len(texts), size), desc="class pictures", unit="batch"):
        chunk = texts[start : start + size]
        key = jax.random.fold_in(jax.random.key(seed), start)
        images = sd.sample(
            key,
            # The last batch is filled up: one program for all.
            [*chunk, *[chunk[-1]] * (size - len(chunk))],
            num_steps=section.num_steps,
            guidance=section.guidance,
        )
        parts.append(np.asarray(sd.encode_images(images), np.float32)[: len(chunk)])
    return np.concatenate(parts)
