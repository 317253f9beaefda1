"""Which files of a repository on the hub are downloaded: by names as real repositories have them,
and through the hub's own client talking to a server of this test."""

import hashlib
import re

import huggingface_hub
import jax
import numpy as np
import pytest

from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.model import StableDiffusion
from hyperlora_jax.stable_diffusion.weights.hub import needed_files

httpx = pytest.importorskip("httpx2")
UNET, TEXT = "diffusion_pytorch_model", "model"
FLAX = ["flax_model.msgpack", "diffusion_flax_model.msgpack", "openvino_model.bin", "model.onnx"]


def forms(folder, stem, *variants, pickles=True):
    """config.json and the weights of a component in all forms that repositories have."""
    pickled = {"model": "pytorch_model"}.get(stem, stem)
    names = [f"{folder}/config.json"]
    for variant in variants:
        names.append(f"{folder}/{stem}{variant}.safetensors")
        names += [f"{folder}/{pickled}{variant}.bin"] * pickles
    return names


TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
SD15 = [
    *(".gitattributes", "README.md", "model_index.json", "v1-inference.yaml"),
    *("v1-5-pruned-emaonly.ckpt", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt"),
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    *forms("safety_checker", TEXT, "", ".fp16"),
    "scheduler/scheduler_config.json",
    *forms("text_encoder", TEXT, "", ".fp16"),
    *(f"tokenizer/{name}" for name in TOKENIZER),
    *forms("unet", UNET, "", ".fp16", ".non_ema"),
    *forms("vae", UNET, "", ".fp16"),
]
SDXL = [
    *(".gitattributes", "LICENSE.md", "README.md", "01.png", "model_index.json"),
    *("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"),
    "sd_xl_offset_example-lora_1.0.safetensors",
    "scheduler/scheduler_config.json",
    *forms("text_encoder", TEXT, "", ".fp16", pickles=False),
    *forms("text_encoder_2", TEXT, "", ".fp16", pickles=False),
    *(f"text_encoder/{name}" for name in FLAX),
    *(f"unet/{name}" for name in (*FLAX, "model.onnx_data", "openvino_model.xml")),
    *("vae_decoder/config.json", "vae_decoder/model.onnx", "vae_encoder/openvino_model.bin"),
    *("vae_1_0/config.json", "vae_1_0/diffusion_pytorch_model.safetensors"),
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in TOKENIZER),
    *forms("unet", UNET, "", ".fp16", pickles=False),
    *forms("vae", UNET, "", ".fp16", pickles=False),
]


def of_components(suffix, *components):
    return [
        name
        for folder in components
        for name in (
            f"{folder}/config.json",
            f"{folder}/{TEXT if folder.startswith('text') else UNET}{suffix}",
        )
    ]


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("names", [SD15, SDXL])
def test_one_set_of_weights_of_each_component(names, variant):
    xl = names is SDXL
    parts = ("text_encoder", *(["text_encoder_2"] if xl else []), "unet", "vae")
    folders = ("tokenizer", *(["tokenizer_2"] if xl else []))
    expected = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *of_components(f".{variant}.safetensors" if variant else ".safetensors", *parts),
        *(f"{folder}/{name}" for folder in folders for name in TOKENIZER),
    ]
    assert needed_files("a/b", names, variant) == sorted(expected)


def weights(names, variant=None):
    needed = needed_files("a/b", ["unet/config.json", *names], variant)
    return [name for name in needed if name != "unet/config.json"]


def test_what_a_repository_lacks_decides_what_is_taken():
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert weights([half, half.replace(".safetensors", ".bin")]) == [half]
    # Half precision as safetensors rather than full precision as a pickle.
    pickled = "unet/diffusion_pytorch_model.bin"
    assert weights([half, pickled]) == [half]
    assert weights([pickled, "unet/diffusion_flax_model.msgpack"]) == [pickled]
    other = "unet/diffusion_pytorch_model.bf16.safetensors"
    assert weights([other]) == [other]
    shards = [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    in_half = [
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    assert weights([*shards, *in_half]) == shards
    assert weights([*shards, *in_half], "fp16") == in_half
    old = sorted(name.replace(".safetensors", ".bin") for name in shards)
    assert weights([*shards, *old]) == shards and sorted(weights(old)) == old
    assert weights([*shards, half], "fp16") == [half]


@pytest.mark.parametrize(
    ("names", "variant", "message"),
    [
        (["model.safetensors"], None, "no unet/config.json.*download model.safetensors and name"),
        (["README.md"], None, "a/b: has no unet/config.json, expected a diffusers model$"),
        (["unet/config.json", "unet/model.onnx"], None, "a/b: has no weights of the unet"),
        (SD15, "bf16", "a/b: has no bf16 weights of the unet"),
    ],
)
def test_a_repository_without_a_base(names, variant, message):
    with pytest.raises(UserError, match=message):
        needed_files("a/b", names, variant)


class Hub:
    """Answers as huggingface.co does, from a dictionary of files; `sent` are those downloaded."""

    def __init__(self, files):
        self.files, self.sent, self.online = files, set(), True
        self.commit = hashlib.sha1(b"commit").hexdigest()

    def __call__(self, request):
        if not self.online:
            raise httpx.ConnectError("no route", request=request)
        path = request.url.path
        if path.startswith("/api/models/someone/base/tree/"):
            return httpx.Response(200, json=[self.entry(name) for name in self.files])
        if path.startswith("/api/models/someone/base"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "someone/base", "sha": self.commit, "siblings": siblings}
            return httpx.Response(200, json={**info, "tags": [], "private": False})
        if found := re.fullmatch(r"/someone/base/resolve/\w+/(.+)", path):
            content = self.files[found[1]]
            etag = self.entry(found[1])["oid"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit}
            if request.method == "HEAD":
                return httpx.Response(200, headers={**headers, "Content-Length": f"{len(content)}"})
            self.sent.add(found[1])
            return httpx.Response(200, headers=headers, content=content)
        return httpx.Response(404, json={"error": "Repository not found"})

    def entry(self, name):
        content = self.files[name]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_pipeline):
    root = tiny_pipeline[0]
    files = {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file()
    }
    for name in SD15:
        files.setdefault(name, b"never wanted")
    answers = Hub(files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    huggingface_hub.set_client_factory(
        lambda: httpx.Client(transport=httpx.MockTransport(answers), follow_redirects=True)
    )
    yield answers
    huggingface_hub.set_client_factory(httpx.Client)
    huggingface_hub.close_session()


def test_a_base_by_its_id_and_again_without_a_network(hub, tiny_pipeline):
    sd = StableDiffusion.from_pretrained("someone/base")
    assert hub.sent == set(needed_files("someone/base", list(hub.files)))
    expected = StableDiffusion.from_pretrained(tiny_pipeline[0])
    jax.tree.map(np.testing.assert_array_equal, sd.params, expected.params)
    hub.sent.clear()
    hub.online = False
    assert StableDiffusion.from_pretrained("someone/base").base_hash == expected.base_hash
    assert not hub.sent


def test_an_id_that_is_not_there(hub):
    with pytest.raises(UserError, match="someone/else: not a directory, and not found on the hub"):
        StableDiffusion.from_pretrained("someone/else")
