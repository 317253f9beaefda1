"""LoRAs and pictures of many people at once: nobody's depend on who else asks."""

import json
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet import editing
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import load_lora, read_metadata
from hyperlora_jax.serve import requests
from hyperlora_jax.serve.studio import Studio
from hyperlora_jax.shipped import HYPERNETWORK, shipped_path
from hyperlora_jax.stable_diffusion.embedded import load_base
from hyperlora_jax.worlds.avatars import Avatars

STEPS = 2
TOLERANCE = 1  # of 255: batches of other sizes round otherwise


@pytest.fixture(name="studio", scope="module")
def _studio():
    hyper = Hypernetwork.restore(shipped_path(HYPERNETWORK))
    random = np.random.default_rng(0)
    flat = random.normal(size=hyper.spec.num_parameters).astype(np.float32)
    directions = editing.Directions(hyper.spec, {"hat": 0.02 * flat}, size=1.0)
    studio = Studio(
        hyper, load_base("tiny-sd"), directions, num_steps=STEPS, sizes=(2, 4), most_waiting=16
    )
    studio._ready = [2, 4]
    yield studio
    studio.close()


@pytest.fixture(name="people", scope="module")
def _people():
    world = Avatars()
    return [world.render(world.identity("test", k), world.view("test", k)) for k in range(3)]


def test_the_shipped_checkpoint_is_small_and_knows_people_of_its_world(studio, people):
    files = [path for path in shipped_path(HYPERNETWORK).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert studio.hyper.default_strength == 1.5
    noise = np.random.default_rng(0).integers(0, 256, people[0].shape, np.uint8)
    scores = [studio.write([picture], 0).familiarity for picture in (*people, noise)]
    assert min(scores[:3]) > 0.02 > scores[3]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(studio.hyper.params))


def test_a_result_is_the_same_alone_and_in_company(studio, people):
    prompts = (["smiling mouth"], ["flat mouth", "red background"], ["blue background"])
    asked = [
        {"prompts": own, "strength": 0.5 + k, "seed": k, "edits": {"hat": k - 1.0}}
        for k, own in enumerate(prompts)
    ]
    subjects = [studio.write([picture], 0) for picture in people]
    alone = [studio.draw(subject, **one)[0] for subject, one in zip(subjects, asked, strict=True)]
    before = sum(size * n for size, n in studio.batches.items())
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda picture: studio.write([picture], 0), people))
        together = list(pool.map(lambda k: studio.draw(again[k], **asked[k])[0], range(3)))
    # The base's pictures of these prompts and seeds are remembered.
    assert sum(size * n for size, n in studio.batches.items()) == 4 + before
    for a, b in zip(alone, together, strict=True):
        assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= TOLERANCE
    assert np.abs(alone[0][0].astype(int) - alone[2][0]).max() > 50


def test_pictures_are_those_of_the_loras_and_seeds_that_other_commands_have(studio, people):
    sd, hyper = studio.sd, studio.hyper
    subject = studio.write([people[0], people[1]], 0)
    lora = hyper.generate(0, [[people[0], people[1]]], strength=0.7)
    key = jax.random.fold_in(jax.random.key(3), 1)
    wanted = sd.sample(0, ["b"], lora=lora, latents=sd.noise(key, 1), num_steps=STEPS)
    drawn, base = (images[1] for images in studio.draw(subject, ["a", "b"], 0.7, 3))
    assert np.abs(255 * np.asarray(wanted[0]) - drawn).max() < 1.5
    plain = sd.sample(0, ["b"], latents=sd.noise(key, 1), num_steps=STEPS)
    assert np.abs(255 * np.asarray(plain[0]) - base).max() < 1.5
    assert np.abs(drawn.astype(int) - base).max() > 20


def test_files_hold_the_lora_that_is_drawn_with(studio, people, tmp_path):
    subject = studio.write([people[0]], 0)
    options = {"strength": 0.7, "seed": 3, "edits": {"hat": 1.0}}
    files = []
    for form in requests.FORMATS:
        (tmp_path / form).mkdir()
        files.append(requests.lora_file(studio, subject, tmp_path / form, form, **options))
    names = [requests.file_name("../Ännä 1?.png", form) for form in requests.FORMATS]
    assert names == ["Ännä_1.kohya.safetensors", "Ännä_1.diffusers.safetensors", "Ännä_1.peft.zip"]
    assert read_metadata(files[0])["hyperlora.strength"] == "0.7"
    drawn = studio.draw(subject, ["a"], 0.7, 3, {"hat": 1.0})[0][0]
    key = jax.random.fold_in(jax.random.key(3), 0)
    for file in files[:2]:
        lora, _ = load_lora(file, studio.sd)
        batch = factors.repeat(lora, 1)
        image = studio.sd.sample(
            0, ["a"], lora=batch, latents=studio.sd.noise(key, 1), num_steps=STEPS
        )
        assert np.abs(255 * np.asarray(image[0]) - drawn).max() < 3
    with zipfile.ZipFile(files[2]) as archive:
        names = archive.namelist()
        config = next(name for name in names if name.endswith("adapter_config.json"))
        assert json.loads(archive.read(config))["peft_type"] == "LORA"
        assert any(name.endswith("adapter_model.safetensors") for name in names)


def test_what_cannot_be_asked_is_said_in_a_line(studio, people):
    with pytest.raises(UserError, match="no direction 'hut', there are hat"):
        studio.draw(studio.write([people[0]], 0), ["a"], 1.0, 0, {"hut": 1.0})
    with pytest.raises(UserError, match="5 pictures, expected 1 to 4"):
        studio.write([people[0]] * 5, 0)
    wrong = {"text.png": b"hello", "empty.png": b"", "cut.png": _png(16, 16)[:40]}
    wrong["small.png"] = _png(7, 16)
    for name, content in wrong.items():
        with pytest.raises(UserError, match=f"^{name}: "):
            requests.read_pictures([(name, content)], studio)
    with pytest.raises(UserError, match="no picture yet"):
        requests.read_pictures([], studio)
    for text in ("", " \n ", "a\n" * 5, "a" * 1001):
        with pytest.raises(UserError, match="prompt"):
            requests.read_prompts(text)
    for value in (None, float("nan"), 3.5, -1):
        with pytest.raises(UserError, match="strength is"):
            requests.number(value, "strength", 0.0, 3.0)


@pytest.mark.parametrize("side", [7000, 12000, 30000])
def test_a_small_file_that_unpacks_to_gigabytes_is_not_unpacked(studio, side):
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"^bomb.png: .* million"):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        requests.read_pictures([("bomb.png", _png(side, side))], studio)


def test_batches_are_full_or_smaller(studio):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio, "_ready", [2, 4, 8, 16])
        taken = {n: studio._portion(n) for n in (0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 17, 99)}
    assert taken == {
        **{0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 6, 8: 8, 9: 8, 11: 8, 12: 12, 17: 16, 99: 16}
    }


def test_prompts_are_shown_as_text(people):
    shown = requests.table(people[:1], ["<b>'x'"], np.stack(people[:1]), np.stack(people[1:2]))
    assert shown.count("<img") == 3 and "<b>" not in shown and "alt='base alone: &lt;b&gt;" in shown


def _png(width, height):
    """A black picture of one bit a pixel, a few KB whatever its size."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )
