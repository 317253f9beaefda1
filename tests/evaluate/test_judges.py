import dataclasses

import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.judges import judges


@dataclasses.dataclass(frozen=True)
class MeanColour:
    """An encoder whose embedding is the mean colour around grey."""

    name: str = "colour"
    embedding_dim: int = 3
    hash: str = "h"
    image_size: tuple[int, int] = (8, 8)
    num_tokens: int = 1

    def encode(self, images):
        pooled = np.asarray(images).mean(axis=(1, 2)) - 0.5
        return pooled, pooled[:, None]


def coloured(colours):
    return np.broadcast_to(
        np.float32(colours)[..., None, None, :], (*np.shape(colours)[:-1], 8, 8, 3)
    )


def test_known_cosines():
    references = coloured([[[1.0, 0.5, 0.5]], [[0.5, 1.0, 0.5]]])
    same, opposite, across = [1.0, 0.5, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 1.0]
    generated = coloured([[same, opposite, across], [across, same, same]])
    found = judges.encoder_similarity(MeanColour(), generated, references)
    np.testing.assert_allclose(found, [[1, -1, 0], [0, 0, 0]], atol=1e-6)


def test_undetected_subjects_and_failures_score_nothing():
    references = coloured([[[1.0, 0.5, 0.5]]])
    generated = coloured([[[1.0, 0.5, 0.5]] * 3]).copy()
    generated[0, 1, 2, 2, 0] = np.nan
    generated[0, 2] *= 0.9
    found = judges.encoder_similarity(
        MeanColour(), generated, references, detects=lambda picture: picture.max() > 0.95
    )
    np.testing.assert_allclose(found, [[1.0, 0.0, 0.0]], atol=1e-6)


def test_numbers_say_which_judge_leaks(test_set):
    references = test_set.references
    images = {
        "generated": test_set.exact[:2],
        "copy_reference": np.repeat(references[:, None], 3, axis=1),
    }
    judged = {"colour": MeanColour()}
    found = judges.similarity_numbers(images, references[:, None], judged, leaky={"colour"})
    found = found["colour"]
    assert found["is_condition_encoder"] and found["similarity"]["generated"]["n"] == 2
    assert found["similarity"]["copy_reference"]["mean"] == pytest.approx(1.0)
    other = judges.similarity_numbers(images, references[:, None], judged)
    assert not other["colour"]["is_condition_encoder"]


def test_several_real_pictures_are_averaged():
    generated = coloured([[[1.0, 0.5, 0.5]]])
    real = coloured([[[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.0, 0.5, 0.5], [1.0, 0.5, 0.5]]])
    found = judges.encoder_similarity(MeanColour(), generated, real)
    np.testing.assert_allclose(found, [[0.25]], atol=1e-6)


def test_kept_embeddings_are_of_these_pictures_and_this_encoder(tmp_path):
    seen = []

    class Counting(MeanColour):
        def encode(self, images):
            seen.append(self.hash)
            return super().encode(images)

    same = coloured([[[1.0, 0.5, 0.5], [0.0, 0.5, 0.5]]])
    judge, other = Counting(), Counting(hash="another")
    first = judges.embeddings(judge, same, tmp_path)
    np.testing.assert_array_equal(judges.embeddings(judge, same, tmp_path), first)
    np.testing.assert_allclose(first, judges.embeddings(MeanColour(), same), atol=1e-6)
    assert seen == ["h"]
    assert np.abs(judges.embeddings(judge, same[:, ::-1], tmp_path) - first).max() > 0.5
    judges.embeddings(other, same, tmp_path)
    assert seen == ["h", "h", "another"]


def test_judges_are_loaded_by_name(tmp_path):
    found = judges.load_judges({"avatars": "avatar", "independent": ""})
    assert list(found) == ["avatars"] and found["avatars"].embedding_dim > 8
    with pytest.raises(UserError, match=r"encoder .*nothing\.onnx: no such file"):
        judges.load_judges({"mine": str(tmp_path / "nothing.onnx")})


def test_detectors_are_named():
    assert judges.load_detector("") is None
    assert judges.load_detector("numpy:all") is np.all
    for name in ("numpy", "numpy:nobody", "no_module:f", "numpy:pi"):
        with pytest.raises(UserError, match=r"evaluate\.detector: "):
            judges.load_detector(name)


def save_clip(folder):
    import transformers

    words = ["<|startoftext|>", "<|endoftext|>", "r", "e", "d", "red</w>", "d</w>", "re", "red"]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")], model_max_length=8
    )
    tokenizer.save_pretrained(folder)
    shared = {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 6}
    vision = {"hidden_size": 8, "intermediate_size": 8, "image_size": 12, "patch_size": 6}
    text = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    ids = {"max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**shared, **text, **ids},
        vision_config={**shared, **vision},
        projection_dim=6,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


def test_clip_text_similarity(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model, tokenizer = save_clip(tmp_path)
    generated = np.random.default_rng(0).random((1, 2, 12, 12, 3)).astype(np.float32)
    found = judges.load_clip(tmp_path).similarity(generated, [["red", "d red"]])
    pixels = torch.from_numpy(((generated[0] - 0.5) / 0.5).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        tokens = tokenizer(
            ["red", "d red"], padding="max_length", max_length=8, return_tensors="pt"
        )
        output = model(pixel_values=pixels, **tokens)
    expected = (output.image_embeds * output.text_embeds).sum(-1).numpy()
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_no_clip(tmp_path):
    pytest.importorskip("torch")
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ViTConfig(**sizes, intermediate_size=8, image_size=8, patch_size=4)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no CLIP model"):
        judges.load_clip(tmp_path)
