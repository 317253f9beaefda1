"""The PyTorch folder writes what JAX writes: every generator, every head, every encoder."""

import copy
import re
import runpy
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image

from hyperlora_jax.cli.main import main
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.encoders.named_encoders import load_condition_encoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.generate import generate_one
from hyperlora_jax.lora import vectorize
from hyperlora_jax.lora.sites import LoraSite, LoraSpec
from hyperlora_jax.lora_files import read_metadata, safetensors_io, save_lora
from hyperlora_jax.pictures.pictures import reference_pixels
from hyperlora_jax.runtime.generate_lora import Applied, LoraGenerator, WrongInput, read_picture
from hyperlora_jax.runtime.pytorch_folder import PROGRAM, write_pytorch
from tests import user_world
from tests.runtime.conftest import SPEC, hypernetwork
from tests.stable_diffusion import conftest as tiny

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
        return np.array(jax.random.normal(key, (count, len(hyper.constants["spread"]))))[:, None]
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
    return np.abs(ours - theirs).max() / np.abs(ours).max()


@pytest.mark.parametrize("case", CASES)
def test_every_generator_writes_what_jax_writes(case, pictures, tmp_path):
    kind, model, draw = CASES[case]
    hyper = hypernetwork(kind, facts={"generate": {"num_steps": 4, **draw}}, **model)
    ours, theirs = both(hyper, pictures, tmp_path)
    assert relative(ours, theirs) < 1e-5
    if kind not in ("mean", "pca_gaussian"):
        assert np.abs(ours[0] - ours[1]).max() > 1e-3


def test_the_file_is_short_and_needs_neither_jax_nor_this_package():
    text = PROGRAM.read_text()
    assert len(text.splitlines()) <= 400
    imported = {name.split(".")[0] for name in re.findall(r"^\s*(?:import|from) (\S+)", text, re.M)}
    others = imported - set(sys.stdlib_module_names)
    assert others == {"torch", "safetensors", "numpy", "PIL", "onnxruntime"}


def write_pictures(folder):
    """Two references that are cut, turned, transparent."""
    random = np.random.default_rng(2)
    pixels = random.integers(0, 256, (41, 50, 4), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels[:32, :48, :3]).save(folder / "b.jpg", exif=exif, quality=95)
    Image.fromarray(np.uint16(pixels[:, :, 0]) * 257 + 90).save(folder / "c.png")
    return [folder / name for name in ("a.png", "b.jpg", "c.png")]


def test_pictures_are_read_as_jax_reads_them(tmp_path):
    encoder = mock.Mock(spec=ImageEncoder, image_size=(16, 12))
    for path in write_pictures(tmp_path):
        ours = np.float32(reference_pixels(path, encoder)) / np.float32(255)
        np.testing.assert_array_equal(read_picture(path, (16, 12)), ours)


def run(folder, *arguments):
    """generate.py in a process that refuses to import JAX and this package; its outcome."""
    hook = (
        "import sys, runpy\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'hyperlora_jax'):\n"
        "            raise ImportError(f'{name} is not there')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", hook, folder / "generate.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def run_here(monkeypatch, folder, *arguments):
    """The same in this process, which is faster; its exit code."""
    program = str(folder / "generate.py")
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(program, run_name="__main__")
    return stop.value.code


def test_its_files_are_those_of_generate(tmp_path, monkeypatch, capsys):
    hyper = hypernetwork("regression")
    hyper.save(tmp_path / "hyper")
    assert main(["export", str(tmp_path / "hyper"), "--out", str(tmp_path / "out"),
                 "--format", "pytorch"]) == 0  # fmt: skip
    references = write_pictures(tmp_path)
    for format in ("kohya", "diffusers", "peft"):
        generate_one(hyper, references, tmp_path / "ours" / format, format=format, dtype="float32")
        arguments = ("--reference", *references, "--out", tmp_path / "theirs" / format,
                     "--format", format, "--dtype", "float32")  # fmt: skip
        if format == "kohya":
            done = run(tmp_path / "out", *arguments)
            assert done.returncode == 0, done.stderr
            said = done.stdout
        else:
            assert run_here(monkeypatch, tmp_path / "out", *arguments) == 0
            said = capsys.readouterr().out
        assert re.search(r"wrote .*theirs.*\.safetensors \(strength 1\.5, familiarity ", said)
    names = {
        str(file.relative_to(tmp_path / "ours"))
        for file in (tmp_path / "ours").rglob("*.*")
        if file.is_file()
    }
    assert len(names) == 4  # one of them is PEFT's configuration
    for name in names:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if ours.suffix == ".json":
            assert ours.read_bytes() == theirs.read_bytes()
            continue
        texts, different = read_metadata(theirs), {"sshs_model_hash", "hyperlora.sha256"}
        assert read_metadata(ours).keys() == texts.keys()
        assert {k: v for k, v in read_metadata(ours).items() if k not in different} == {
            k: v for k, v in texts.items() if k not in different
        }
        a, b = safetensors_io.read(ours)[0], safetensors_io.read(theirs)[0]  # hashes are compared
        assert list(a) == list(b)
        for key, value in a.items():
            assert value.dtype == b[key].dtype and value.shape == b[key].shape
            assert np.abs(value - b[key]).max() <= 1e-5 * np.abs(value).max()


def test_the_same_numbers_are_the_same_bytes(tmp_path):
    hyper = hypernetwork("mean")
    ours = save_lora(tmp_path / "a.safetensors", vectorize.unflatten(
        np.asarray(hyper.constants["mean"]), hyper.spec), hyper.spec, metadata=hyper.provenance,
        family="sd1")  # fmt: skip
    folder = exported(hyper, tmp_path / "out")
    folder.save(tmp_path / "b.safetensors", folder.matrices(folder.weights["lora"]["mean"], 1.0))
    a, b = safetensors_io.read(ours), safetensors_io.read(tmp_path / "b.safetensors")
    assert a[1] == b[1]  # the hash of the data among them


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reference", "none.png"), "No such file"),
        (("--reference", "config.json"), "cannot identify image"),
        ((), "--reference"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    write_pytorch(hypernetwork("mean"), tmp_path)
    given = [tmp_path / a if "." in a else a for a in arguments]
    assert run_here(monkeypatch, tmp_path, *given, "--out", tmp_path / "x.safetensors") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("generate.py: ") and said in line
    assert not (tmp_path / "x.safetensors").exists()


def test_damaged_folders_are_named(tmp_path):
    hyper = hypernetwork("mean")
    write_pytorch(hyper, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"xxxxxxxxxxxx")
    with pytest.raises(WrongInput, match=r"model\.safetensors: "):
        LoraGenerator(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(WrongInput, match="found format 'other', expected 'hyperlora-pytorch-1'"):
        LoraGenerator(tmp_path)


def test_a_lora_of_several_models_is_no_peft_folder(tmp_path):
    text = LoraSite("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 24, 24, 2)
    folder = exported(hypernetwork("mean", spec=LoraSpec((*SPEC.sites, text))), tmp_path)
    with pytest.raises(WrongInput, match=r"'peft': .* expected one of \['kohya', 'diffusers'\]$"):
        folder.save(tmp_path / "x", [], "peft")


def test_what_only_jax_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected 'raw'"):
        write_pytorch(hypernetwork("ridge", baseline={"space": "delta"}), tmp_path)


def write_encoder(name, root):
    """A tiny vision encoder of this kind, saved by the software that it is of."""
    if name == "clip":
        return user_world.write_clip(root)
    if name == "onnx":
        return user_world.write_onnx(root.with_suffix(".onnx"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 20,
             "patch_size": 5, "intermediate_size": 32}  # fmt: skip
    convolutional = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    class_ = getattr(transformers, name)
    config = class_.config_class(**(convolutional if name == "ResNetModel" else sizes))
    tiny.randomise(class_(config), 0).save_pretrained(root)
    return root


@pytest.mark.parametrize(
    "name",
    ["clip", "onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "ViTModel", "Dinov2Model", "SiglipVisionModel", "ResNetModel"))],
)  # fmt: skip
def test_encoders_of_others(name, tmp_path):
    options = {"image_size": (32, 32)} if name == "ResNetModel" else {}
    encoder = load_condition_encoder(write_encoder(name, tmp_path / "encoder"), **options)
    side = encoder.image_size[0]
    seen = np.float32(np.random.default_rng(3).uniform(size=(2, 3, side, side, 3)))
    folder = exported(hypernetwork("ridge", encoder), tmp_path / "out")
    pooled, tokens = encoder.encode(seen.reshape(-1, side, side, 3))
    theirs = folder.embed(torch.from_numpy(seen))
    merged = np.asarray(pooled).reshape(2, 3, -1).mean(1)
    assert relative(merged, theirs[0].numpy()) < 1e-5
    assert relative(np.asarray(tokens).reshape(2, -1, tokens.shape[-1]), theirs[1].numpy()) < 1e-5


@pytest.mark.slow
def test_the_same_picture_by_either_file_and_without_one(tmp_path, monkeypatch):
    user_world.write_base(tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    sites = tuple(
        LoraSite(name, module.weight.shape[1], module.weight.shape[0], 2)
        for name, module in pipe.unet.named_modules()
        if re.search(r"attn[12]\.to_[qv]$", name)
    )
    hypernetwork("knn", spec=LoraSpec(sites)).save(tmp_path / "hyper")
    reference, folder = str(write_pictures(tmp_path)[0]), tmp_path / "out"
    files = [tmp_path / f"{name}.safetensors" for name in ("ours", "theirs")]
    for command in (
        ("export", tmp_path / "hyper", "--out", folder, "--format", "pytorch"),
        ("generate", "--checkpoint", tmp_path / "hyper", "--reference", reference, "--out",
         files[0]),
    ):  # fmt: skip
        assert main([*map(str, command)]) == 0
    assert run_here(monkeypatch, folder, "--reference", reference, "--out", files[1]) == 0

    def drawn():
        noise = torch.Generator().manual_seed(0)
        return pipe("a portrait", num_inference_steps=3, generator=noise, output_type="np").images

    hyper = LoraGenerator(folder)
    lora = hyper.matrices(hyper.generate([[reference]])[0][0])
    files.append(tmp_path / "exact.safetensors")
    hyper.save(files[-1], lora, "diffusers", "float32")
    plain, found = drawn(), []
    for file in files:
        pipe.load_lora_weights(file)
        found.append(drawn())
        pipe.unload_lora_weights()
    applied = Applied(pipe.unet, hyper, lora)
    found.append(drawn())
    applied.remove()
    assert np.abs(drawn() - plain).max() == 0
    assert np.abs(found[0] - found[1]).max() <= 1e-3
    assert np.abs(found[2] - found[3]).max() <= 1e-4
    assert all(np.abs(picture - plain).max() > 0.05 for picture in found)


def test_a_lora_on_a_unet_and_another_in_its_place(tmp_path):
    unet = tiny.torch_unet(tiny.tiny_unet_config())
    shapes = {
        name: (module, module.weight.shape)
        for name, module in unet.named_modules()
        if re.search(r"attn[12]\.to_[qv]$|resnets\.0\.conv1$", name)
    }
    spec = LoraSpec(tuple(
        LoraSite(name, shape[1], shape[0], 2, *(("conv", (3, 3)) if len(shape) == 4 else ()))
        for name, (_, shape) in shapes.items()
    ))  # fmt: skip
    folder = exported(hypernetwork("pca_gaussian", spec=spec), tmp_path)
    inputs = torch.randn(1, 4, 16, 16), 10, torch.randn(1, 7, unet.config.cross_attention_dim)
    random = torch.Generator().manual_seed(0)
    vectors = 0.1 * torch.randn(2, spec.num_parameters, generator=random)

    def drawn(network):
        with torch.no_grad():
            return network(*inputs, return_dict=False)[0]

    plain, found, applied = drawn(unet), [], None
    *untouched, last = [copy.deepcopy(unet) for _ in range(3)]
    for vector in vectors:
        if applied is None:
            applied = Applied(unet, folder, folder.matrices(vector, 1.0))
        else:
            applied.set(folder.matrices(vector, 1.0))
        found.append(drawn(unet))
    applied.remove()
    assert (drawn(unet) == plain).all()
    for vector, other, ours in zip(vectors, untouched, found, strict=True):
        file = tmp_path / "lora.safetensors"
        folder.save(file, folder.matrices(vector, 1.0), "diffusers", "float32")
        other.load_lora_adapter(safetensors.torch.load_file(file), prefix="unet")
        assert (drawn(other) - ours).abs().max() < 1e-5 < (plain - ours).abs().max()
    # The file that JAX writes of the same LoRA shows the same picture.
    save_lora(file, vectorize.unflatten(vectors[1].numpy(), spec), spec, "diffusers", "float32")
    last.load_lora_adapter(safetensors.torch.load_file(file), prefix="unet")
    assert (drawn(last) - found[1]).abs().max() < 1e-3
    with pytest.raises(WrongInput, match="another family than sd1"):
        Applied(tiny.torch_unet(tiny.tiny_unet_config(cross_attention_dim=20)), folder,
                folder.matrices(vectors[0]))  # fmt: skip
