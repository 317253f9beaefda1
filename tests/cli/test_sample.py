"""`hyperlora sample` with several LoRA files."""

import jax
import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.cli.main import main
from hyperlora_jax.lora import factors
from hyperlora_jax.lora_files import save_lora
from hyperlora_jax.stable_diffusion.embedded import load_base

QUICK = ("sample", "tiny-sd", "--prompt", "a", "b", "--num_steps", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two LoRAs of different ranks and sites, in files of one name."""
    root, sd = tmp_path_factory.mktemp("loras"), load_base("tiny-sd")
    paths = []
    for k, (preset, rank) in enumerate((("w2w", 1), ("attn-qkvo", 4))):
        spec = sd.lora_spec(preset, rank)
        rng = np.random.default_rng(k)
        lora = jax.tree.map(
            lambda leaf, rng=rng: rng.standard_normal(leaf.shape).astype(np.float32),
            factors.zeros(spec),
        )
        paths.append(root / str(k) / "lora.safetensors")
        save_lora(paths[-1], lora, spec, format="diffusers")
    return [str(path) for path in paths]


def pixels(folder):
    found = {path.name: np.asarray(Image.open(path), np.int16) for path in folder.iterdir()}
    found.pop("contact_sheet.png")
    return found


def test_files_of_other_ranks_and_one_name_are_drawn_beside_each_other(files, tmp_path):
    both, weak = tmp_path / "both", tmp_path / "weak"
    assert main([*QUICK, "--lora", *files, "--out", str(both)]) == 0
    found = pixels(both)
    assert sorted(found) == [f"lora-{i}_0{j}.png" for i in (1, 2) for j in (0, 1)]
    assert main([*QUICK, "--lora", *files, "--strength", "1", "0", "--out", str(weak)]) == 0
    weakened = pixels(weak)
    for name in ("lora-1_00.png", "lora-1_01.png"):
        assert np.abs(weakened[name] - found[name]).max() <= 1
    for name in ("lora-2_00.png", "lora-2_01.png"):
        assert np.abs(weakened[name] - found[name]).max() > 20


def test_batches_and_sizes(files, tmp_path):
    """Three pictures of every LoRA, two at a time, are the same as all at once."""
    wanted, found = tmp_path / "all", tmp_path / "two"
    command = ["sample", "tiny-sd", "--prompt", "a", "b", "c", "--num_steps", "1"]
    command += ["--lora", *files, "--strength", "0.5", "1"]
    assert main([*command, "--out", str(wanted)]) == 0
    assert main([*command, "--out", str(found), "--batch_size", "4"]) == 0
    both = pixels(wanted), pixels(found)
    assert len(both[0]) == 6 and both[0].keys() == both[1].keys()
    assert all(np.abs(both[0][name] - both[1][name]).max() <= 1 for name in both[0])
    assert main([*QUICK, "--out", str(tmp_path / "wide"), "--width", "32"]) == 0
    assert pixels(tmp_path / "wide")["base_00.png"].shape == (16, 32, 3)


def test_one_more_prompt_or_lora_changes_no_other_picture(files, tmp_path):
    few, more, one = tmp_path / "few", tmp_path / "more", tmp_path / "one"
    # Not so strong that the last digits grow into colours.
    command = ["sample", "tiny-sd", "--num_steps", "1", "--strength", "0.1", "--prompt", "a", "b"]
    assert main([*command, "--lora", *files, "--out", str(few)]) == 0
    assert main([*command, "c", "--lora", *files, "--out", str(more)]) == 0
    assert main([*command, "--lora", files[1], "--out", str(one)]) == 0
    before, after, alone = pixels(few), pixels(more), pixels(one)
    assert all(np.abs(after[name] - picture).max() <= 1 for name, picture in before.items())
    for k in (0, 1):
        assert np.abs(alone[f"lora_{k:02d}.png"] - before[f"lora-2_{k:02d}.png"]).max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--strength", "1", "2", "3"), "--strength: 3 numbers for 0 LoRAs"),
        (("--negative_prompt", "x"), "negative prompts do nothing at guidance 1"),
        (("--num_steps", "0"), "num_steps is 0, expected 1 to 1000"),
        (("--batch_size", "0"), "--batch_size is 0, expected at least 1"),
        (("--height", "17"), "height is 17, expected a multiple of"),
        (("--sampler", "magic"), "sampler is 'magic', expected one of"),
        (("--lora", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--region", "left:nowhere.safetensors"), "nowhere.safetensors"),
        (("--region", "0,0,2,1"), "region 0,0,2,1: expected a box"),
        (("--region", "left", "--lora", "x"), "--lora and --region: found both"),
        (("--region", "left", "--region_prompt", "a", "b"), "--region_prompt: 2 for 1 regions"),
        (("--apart",), "--apart: found no --region"),
        (("--lora_branches", "none"), "lora_branches is 'none'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_regions_of_one_picture(files, tmp_path):
    """Each half under its own LoRA and prompt; without a file it is the base's."""
    options = ["--region_prompt", "a", "b", "--strength", "0", "0.2"]
    regions = ["--region", f"left:{files[0]}", "--region", f"0.5,0,1,1:{files[1]}"]
    assert main([*QUICK, *regions, *options, "--out", str(tmp_path / "both")]) == 0
    assert main([*QUICK, "--out", str(tmp_path / "base")]) == 0
    both, base = pixels(tmp_path / "both"), pixels(tmp_path / "base")
    assert sorted(both) == ["regions_00.png", "regions_01.png"]
    assert np.abs(both["regions_00.png"] - base["base_00.png"]).max() > 5


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*QUICK, "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_loras_act_on_both_branches_or_on_the_conditional_one(files, tmp_path):
    drawn = {}
    for name in ("default", "both", "conditional"):
        command = [*QUICK, "--lora", files[0], "--strength", "0.1", "--guidance", "3"]
        command += ["--out", str(tmp_path / name)]
        if name != "default":
            command += ["--lora_branches", name]
        assert main(command) == 0
        drawn[name] = np.stack([*pixels(tmp_path / name).values()])
    np.testing.assert_array_equal(drawn["default"], drawn["both"])
    assert np.abs(drawn["conditional"] - drawn["both"]).max() > 1
