"""The Python interface as people use it: the README's snippet, public names."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import hyperlora_jax as hl
from hyperlora_jax.encoders import named_encoders
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.hypernetwork import Hypernetwork

README = Path(__file__).parents[1] / "README.md"


def write_checkpoint(folder):
    """What the demo leaves there: an encoder and a generator, fitted in no time."""
    base = hl.load_base("tiny-sd")
    spec = base.lora_spec("w2w", 1)
    encoder = named_encoders.load_condition_encoder("avatar")
    model = {"generator": "ridge", "baseline": {}}
    generator, random = build_generator(spec, model), np.random.default_rng(0)
    vectors = 0.1 * random.normal(size=(8, spec.num_parameters)).astype(np.float32)
    known = random.normal(size=(8, encoder.embedding_dim)).astype(np.float32)
    facts = {"base": "tiny-sd", "base_hash": base.base_hash, "family": "sd1"}
    constants = generator.fit(known, vectors)
    Hypernetwork(generator, {}, encoder, facts, model, constants).save(folder)


def test_the_readme_snippet_runs_as_pasted(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("demo/run/hypernetwork"))
    Path("demo/loras").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save("demo/loras/00.reference.png")
    exec(compile(snippet, "README.md", "exec"), {})
    assert np.asarray(Image.open("pictures/00.png")).shape == (16, 16, 3)
    lora, spec = hl.load_lora("anna.safetensors", hl.load_base("tiny-sd"))
    assert len(spec) == len(hl.load_base("tiny-sd").lora_spec("w2w", 1))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(lora)) > 0


def test_dir_shows_the_public_names_and_they_are_there():
    assert dir(hl) == sorted(hl.__all__)
    for name in hl.__all__:
        assert getattr(hl, name) is not None
    code = "import hyperlora_jax as hl; dir(hl); import sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
