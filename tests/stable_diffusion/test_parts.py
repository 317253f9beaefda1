"""Folders whose parts belong to different models, through the commands that read them."""

import json
import shutil

import numpy as np
import pytest

from hyperlora_jax.cli.main import main
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.weights import loading
from tests.stable_diffusion import conftest as tiny


@pytest.fixture
def copied(tiny_pipeline, tmp_path):
    return shutil.copytree(tiny_pipeline[0], tmp_path / "base")


def rewrite(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def sample(base, capsys):
    code = main(["sample", str(base), "--prompt", "a cat", "--out", f"{base}-out",
                 "--num_steps", "1"])  # fmt: skip
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    "kind", ["Inpaint", pytest.param("InstructPix2Pix", marks=pytest.mark.slow)]
)
def test_unets_that_take_a_picture_too_draw_without_one(copied, tmp_path, kind):
    """As diffusers does of a picture that is all masked, or of zeros instead of a picture."""
    import diffusers
    import torch

    channels = {"Inpaint": 9, "InstructPix2Pix": 8}[kind]
    tiny.torch_unet(tiny.tiny_unet_config(in_channels=channels)).save_pretrained(copied / "unet")
    # Groups of one channel would divide rounding errors by the spread of a grey picture, 0.
    tiny.torch_vae(tiny.tiny_vae_config(norm_num_groups=2)).save_pretrained(copied / "vae")
    sd = StableDiffusion.from_pretrained(copied)
    sd.save_pretrained(tmp_path / "again", "float32")
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    options = {"num_steps": 3, "guidance": 3.0, "sampler": "ddim", "latents": noise}
    ours = sd.sample(0, ["a cat"], negative_prompts="a dog", **options)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(pipe).__name__ == f"StableDiffusion{kind}Pipeline"
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt": "a cat", "negative_prompt": "a dog", "num_inference_steps": 3}
    text |= {"guidance_scale": 3.0, "latents": tiny.nchw(noise), "output_type": "np"}
    if kind == "Inpaint":  # its own encoding of the grey picture is drawn at random
        grey = pipe.vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
        grey = grey.detach() * pipe.vae.config.scaling_factor
        sizes = {"height": 32, "width": 32}
        text |= {"image": torch.zeros(1, 3, 32, 32), "mask_image": torch.ones(1, 1, 32, 32)}
        theirs = pipe(**text, **sizes, masked_image_latents=grey).images
    else:
        theirs = pipe(**text, image=torch.zeros(1, 4, 8, 8)).images
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5


def test_unets_of_other_numbers_of_channels(copied, capsys):
    tiny.torch_unet(tiny.tiny_unet_config(in_channels=7)).save_pretrained(copied / "unet")
    code, error = sample(copied, capsys)
    assert code == 2 and "\n" not in error
    assert "takes 7 channels, the autoencoder makes 4; expected a UNet of 4 channels, or" in error
    with pytest.raises(UserError, match="takes 7 channels"):
        StableDiffusion.outline(copied)  # as import and compile read it


def test_a_unet_with_a_learned_variance(copied, capsys):
    tiny.torch_unet(tiny.tiny_unet_config(out_channels=8)).save_pretrained(copied / "unet")
    code, error = sample(copied, capsys)
    assert code == 2 and "takes 4 channels and makes 8" in error and "\n" not in error


def test_an_autoencoder_of_another_family(copied, capsys):
    tiny.torch_vae(tiny.tiny_vae_config(latent_channels=16)).save_pretrained(copied / "vae")
    code, error = sample(copied, capsys)
    assert code == 2 and "takes 4 channels, the autoencoder makes 16" in error


def test_a_text_encoder_of_another_width(copied, capsys):
    wide = tiny.tiny_text_config(hidden_size=48, num_attention_heads=6)
    tiny.torch_text(wide).save_pretrained(copied / "text_encoder")
    code, error = sample(copied, capsys)
    assert code == 2 and "states of width 48, the UNet's cross-attention takes 24" in error


def test_a_refiner_is_named(tiny_xl, tmp_path):
    root = shutil.copytree(tiny_xl[0], tmp_path / "refiner")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(root / name)
    refiner = {**tiny.XL_UNET, "cross_attention_dim": 32}
    for sizes, reason in ((5, "an SDXL refiner"), (7, "added embedding takes 62 numbers")):
        inputs = {"projection_class_embeddings_input_dim": 20 + 6 * sizes}
        rewrite(root / "unet" / "config.json", **(refiner | inputs))
        with pytest.raises(UserError, match=reason):
            StableDiffusion.outline(root)


def test_a_vocabulary_that_is_larger_than_the_table(copied, capsys):
    small = tiny.torch_text(tiny.tiny_text_config(vocab_size=98, bos_token_id=96, eos_token_id=97))
    small.save_pretrained(copied / "text_encoder")
    code, error = sample(copied, capsys)
    assert code == 2 and "gives token 98, the text encoder's table has 98 rows" in error


def test_a_prompt_beyond_the_window_is_said(tiny_pipeline, caplog):
    sd = StableDiffusion.outline(tiny_pipeline[0])
    assert sd.tokenize(["cat " * 14]).shape == (1, 16) and not caplog.messages
    sd.tokenize(["dog", "cat " * 15])
    assert caplog.messages == ["a prompt of 17 tokens is cut to 16, start and end included"]


def test_tokenizers_that_say_no_length_take_the_text_encoders(copied):
    sd = StableDiffusion.from_pretrained(copied)
    expected = sd.tokenize(["a cat", "dog on a cat"])
    file = copied / "tokenizer" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    values.pop("model_max_length")
    file.write_text(json.dumps(values))
    found = StableDiffusion.from_pretrained(copied).tokenize(["a cat", "dog on a cat"])
    assert (found == expected).all() and found.shape == (2, 16)
    rewrite(file, model_max_length=77)
    with pytest.raises(UserError, match="model_max_length is 77, the text encoder has 16"):
        StableDiffusion.from_pretrained(copied).tokenize(["a cat"])


def test_tokenizers_without_a_vocabulary(copied):
    folder = copied / "tokenizer"
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(UserError, match="has no vocabulary, expected tokenizer"):
        StableDiffusion.from_pretrained(copied).tokenize(["a cat"])
    (folder / "vocab.json").write_text(json.dumps({"a</w>": 0}))
    with pytest.raises(UserError, match=r"vocab.json without merges.txt"):
        StableDiffusion.from_pretrained(copied).tokenize(["a cat"])
    (folder / "merges.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1")
    with pytest.raises(UserError, match=r"merges.txt: a Git LFS pointer"):
        StableDiffusion.from_pretrained(copied).tokenize(["a cat"])


def test_another_kind_of_schedule(copied, capsys):
    file = copied / "scheduler" / "scheduler_config.json"
    edm = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}
    file.write_text(json.dumps(edm))
    code, error = sample(copied, capsys)
    assert code == 2 and "scheduler_config.json: scheduler EDMEulerScheduler" in error


def test_a_scheduler_that_the_folder_names_otherwise_is_said(copied, caplog):
    file = copied / "scheduler" / "scheduler_config.json"
    loading.load_schedule(copied)
    assert not caplog.messages
    rewrite(file, _class_name="EulerDiscreteScheduler")
    assert loading.load_schedule(copied).sampler == "euler"
    assert "says DDIMScheduler" in caplog.text and "says EulerDiscreteScheduler" in caplog.text


def test_old_folders_get_the_offset_that_pytorch_sets(copied):
    rewrite(copied / "scheduler" / "scheduler_config.json", steps_offset=0)
    assert StableDiffusion.from_pretrained(copied).schedule.steps_offset == 1


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_folders_of_one_variant_alone(copied, capsys, variant):
    expected = StableDiffusion.from_pretrained(copied)
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (copied / name).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    assert StableDiffusion.from_pretrained(copied).base_hash == expected.base_hash
    assert sample(copied, capsys)[0] == 0
    with pytest.raises(UserError, match=r"fp32.*file not found"):
        StableDiffusion.from_pretrained(copied, variant="fp32")


def test_damaged_helper_files(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    expected = StableDiffusion.from_pretrained(copied).base_hash
    for text in ("", "[]", '{"files": []}'):
        (cached,) = (tmp_path / "cache" / "base_hashes").iterdir()
        cached.write_text(text)
        assert StableDiffusion.from_pretrained(copied).base_hash == expected
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(copied / "unet" / "kept")
    for text in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
        (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index.json: has no weight_map|named by .*index.json"):
            StableDiffusion.from_pretrained(copied)


def test_a_folder_of_another_family_is_named(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match=r"expected a Stable Diffusion .* found a FluxPipeline"):
        StableDiffusion.from_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "found a FluxPipeline" in capsys.readouterr().err


def test_what_is_no_base_is_named_where_only_its_layers_are_read(copied, tmp_path, capsys):
    """By merge, extract, convert and inspect."""

    def refusal(base):
        lora = ("x.safetensors", "--out", tmp_path / "out", "--format", "kohya")
        assert main([str(w) for w in ("convert", *lora, "--base", base)]) == 2
        return capsys.readouterr().err

    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.with_suffix(".bin").write_bytes(b"\x80\x02K\x01.")
    assert "diffusion_pytorch_model.bin: no PyTorch file of plain tensors" in refusal(copied)
    for text, reason in (
        ("[]", "found list, expected a JSON object"),
        ("{", "not a readable JSON file"),
    ):
        (copied / "unet" / "config.json").write_text(text)
        assert f"unet/config.json: {reason}" in refusal(copied)
    flux = tmp_path / "flux"
    flux.mkdir()
    (flux / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "or XL model, found a FluxPipeline" in refusal(flux)
    assert "folder not found, expected the UNet" in refusal(tmp_path / "nothing")


class Callback:
    """What Lightning keeps in its checkpoints."""


def test_checkpoints_of_trainers_are_refused_with_a_way_out(tmp_path, capsys):
    import torch

    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {Callback: 1}}, path)
    assert "save its state_dict as .safetensors" in sample(path, capsys)[1]
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.ckpt: a Git LFS pointer" in sample(path, capsys)[1]
    torch.save([torch.ones(2)], path)
    assert "found list, expected tensors by their names" in sample(path, capsys)[1]
