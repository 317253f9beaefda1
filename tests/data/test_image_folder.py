import json

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.data import image_folder, pictures
from hyperlora_jax.data.size_buckets import of_one_area, square
from hyperlora_jax.errors import UserError


def save(path, width=20, height=12, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[:, : width // 2, 0] = 250
    ramp[: height // 2, :, 1] = 250
    Image.fromarray(ramp).save(path, **options)
    return path


def test_folders_are_concepts(tmp_path):
    for name in ("bert/1.png", "anna/b.webp", "anna/a.jpg"):
        save(tmp_path / name)
    (tmp_path / "notes").mkdir()
    folders = image_folder.open_image_folder(tmp_path)
    assert [folder.name for folder in folders] == ["anna", "bert"]
    assert image_folder.open_image_folder(tmp_path / "bert") == [tmp_path / "bert"]
    anna = image_folder.read_concept(folders[0], square(8), "a photo of sks")
    assert (anna.id, anna.identity) == ("anna", "anna")
    assert len(anna.references) == len(anna.targets) == 2
    assert anna.captions == ("a photo of sks",) * 2
    assert pictures.decode(anna.references[0]).shape == (8, 8, 3)


def test_metadata_gives_captions_roles_and_identity(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    rows = [
        {"file_name": "a.png", "role": "reference", "identity": "Anna"},
        {"file_name": "b.png", "role": "target", "text": "anna at the sea"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    concept = image_folder.read_concept(tmp_path, square(8))
    assert concept.identity == "Anna"
    assert (len(concept.references), concept.captions) == (2, ("anna at the sea", ""))


def test_a_concept_takes_the_bucket_of_its_targets(tmp_path):
    """Upright, EXIF counted; a reference of another shape is cut to the same."""
    exif = Image.Exif()
    exif[0x0112] = 8
    save(tmp_path / "a.jpg", 40, 20, exif=exif)  # stands upright: 40 high
    save(tmp_path / "b.webp", 22, 38)
    save(tmp_path / "c.png", 38, 22)
    rows = [{"file_name": "c.png", "role": "reference"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert pictures.upright_size(tmp_path / "a.jpg") == (40, 20)
    concept = image_folder.read_concept(tmp_path, of_one_area(16, 4))
    assert len(concept.targets) == 2 and len(concept.references) == 3
    for png in (*concept.targets, *concept.references):
        assert pictures.decode(png).shape == (20, 12, 3)
    with pytest.raises(UserError, match=r"text\.png: found 5 bytes that are no picture"):
        (tmp_path / "text.png").write_bytes(b"hello")
        image_folder.read_concept(tmp_path, of_one_area(16, 4))


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist, expected a folder"):
        image_folder.open_image_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file: is a file, expected a folder"):
        image_folder.open_image_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: empty, expected a folder per concept"):
        image_folder.open_image_folder(tmp_path / "empty")
    with pytest.raises(UserError, match="empty: has no pictures"):
        image_folder.read_concept(tmp_path / "empty", square(8))


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["{"], r"metadata\.jsonl:1: expected a JSON object"),
        (['{"file_name": "a.png"}', '{"text": "x"}'], r'metadata\.jsonl:2: .* "file_name"'),
        (['{"file_name": "z.png"}'], "'z.png' is no picture of this folder"),
        (['{"file_name": "a.png", "role": "main"}'], "role 'main', expected one of reference"),
        (['{"file_name": "a.png", "text": 3}'], "text is 3, expected a text"),
        (['{"file_name": "a.png", "role": "reference"}'], "names no target picture"),
        (['{"file_name": "a.png", "role": "target"}'], "names no reference picture"),
    ],
)
def test_bad_metadata_is_named(tmp_path, lines, match):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=match):
        image_folder.read_concept(tmp_path, square(8))


def test_two_identities_in_one_folder(tmp_path):
    rows = []
    for name, identity in (("a", "Anna"), ("b", "Bert")):
        save(tmp_path / f"{name}.png")
        rows.append(json.dumps({"file_name": f"{name}.png", "identity": identity}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"identities \['Anna', 'Bert'\], expected one"):
        image_folder.read_concept(tmp_path, square(8))
