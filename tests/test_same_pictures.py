"""Training and `generate` see the same of a file: pixels and embeddings, with every encoder."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from hyperlora_jax.encoders import condition_encoders, named_encoders
from hyperlora_jax.encoders.image_encoder import ConvEncoder, init_encoder
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.pictures.pictures import load_image, reference_pixels
from hyperlora_jax.pictures.references import read_references
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.subjects.encoding_cache import encode_once
from hyperlora_jax.subjects.subject_pictures import load_pictures
from tests import user_world

# Below, at and above the sizes of the encoders (16 to 28 pixels) and of the base (16).
SHAPES = ((12, 9), (16, 16), (20, 20), (28, 40), (100, 67), (224, 448))


@pytest.fixture(name="encoders", scope="module")
def _encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    load = named_encoders.load_condition_encoder
    module = ConvEncoder(image_size=16, widths=(8, 8), embedding_dim=8, pool_channels=4)
    params = init_encoder(module, jax.random.key(3))
    ours = condition_encoders.FlaxImageEncoder(
        "e", module, params, condition_encoders.tree_hash(params)
    )
    return {
        "ours": ours,
        "clip": load(user_world.write_clip(root / "clip")),
        "vit": load(user_world.write_vit(root / "vit")),
        "onnx": load(user_world.write_onnx(root / "encoder.onnx")),
    }


@pytest.fixture(name="people", scope="module")
def _people(tmp_path_factory):
    """Two people; one is told by pictures that she is not fitted on."""
    root, random = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for name in ("anna", "bert"):
        (root / name).mkdir()
        for k, (height, width) in enumerate(SHAPES):
            pixels = random.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    rows = [
        '{"file_name": "0.png", "role": "target"}',
        '{"file_name": "4.png", "role": "reference"}',
    ]
    (root / "anna" / "metadata.jsonl").write_text("\n".join(rows))
    return root


@pytest.mark.parametrize("kind", ["ours", "clip", "vit", "onnx"])
def test_training_and_generate_see_the_same(encoders, people, kind, tmp_path):
    encoder, sd = encoders[kind], load_base("tiny-sd")
    data = ConfigDict({"source": str(people), "skip_damaged": False})
    subjects = load_pictures(data, 2, 16)
    encoded = encode_once(tmp_path, sd, subjects, encoder=encoder, latents=False, texts=False)
    spec = LoraSpec((LoraSite("mid_block.attentions.0.proj_in", 8, 8, 2),))
    model = {"generator": "mean"}
    hyper = Hypernetwork(build_generator(spec, model), {}, encoder, {}, model)
    seen_by_training = subjects.seen_at(encoder.image_size)
    for number, (name, own) in enumerate({"anna": [1, 2, 3, 4, 5], "bert": [*range(6)]}.items()):
        files = [people / name / f"{k}.png" for k in own]
        for k, file in enumerate(files):
            seen = reference_pixels(file, encoder)
            assert seen.shape == (*encoder.image_size, 3)
            np.testing.assert_array_equal(seen, load_image(file, encoder.image_size))
            np.testing.assert_array_equal(seen_by_training[number][k], seen)
            (given,) = read_references(file, encoder)
            np.testing.assert_array_equal(given[0], np.float32(seen) / np.float32(255))
        pooled, tokens = hyper.embed([files])
        trained_on = encoded.references.of(number)
        np.testing.assert_allclose(trained_on["pooled"], pooled[0], atol=1e-5)
        np.testing.assert_allclose(trained_on["tokens"], tokens[0], atol=1e-5)
