import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures import image_folder, pictures
from hyperlora_jax.pictures.size_buckets import of_one_area, square
from hyperlora_jax.subjects.concept_sources import list_concepts


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
    (alone,) = image_folder.open_image_folder(tmp_path / "bert")
    assert (alone.path, alone) == (tmp_path / "bert", folders[1])
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
        (['{"file_name": "a.png", "text": null}'], "text is None, expected a text"),
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


def names_of(folder):
    return {own.name: [Path(file.path).name for file in own.files] for own in folder}


def captions_of(folder):
    return {Path(file.path).name: file.caption for file in folder.files}


def test_what_systems_leave_behind_is_no_subject(tmp_path, capsys):
    save(tmp_path / "1.png")
    save(tmp_path / "2.JPG", format="JPEG")
    for left in (".ipynb_checkpoints/1-checkpoint.png", "@eaDir/1.png", "__MACOSX/2.png",
                 "1-masklabel.png"):  # fmt: skip
        save(tmp_path / left)
    for name in ("._1.jpg", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    folders = image_folder.open_image_folder(tmp_path)
    assert names_of(folders) == {tmp_path.name: ["1.png", "2.JPG"]}
    said = f"note: {tmp_path}: not read: 2 files (AppleDouble ._* 1, mask 1)\n"
    assert capsys.readouterr().err == said


def test_what_is_not_read_is_counted_in_one_line(tmp_path, capsys):
    save(tmp_path / "anna" / "1.png")
    save(tmp_path / "anna" / "album.jpg" / "2.png")  # a folder by this name
    (tmp_path / "anna" / "empty.jpg").mkdir()
    save(tmp_path / "bert" / "old" / "3.png")
    for name in ("anna/a.heic", "anna/b.HEIC", "carl/c.heic", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "anna" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    row = {"file_name": "1.png", "text": "a", "label": 3, "caption": "b"}
    (tmp_path / "anna" / "metadata.jsonl").write_text(json.dumps(row))
    assert names_of(image_folder.open_image_folder(tmp_path)) == {"anna": ["1.png"]}
    assert capsys.readouterr().err == (
        f"note: {tmp_path}: not read: 5 files (.heic 3, .md 1, .png 1; "
        "save .heic as .jpg or .png to have them read); "
        "2 folders of pictures further below (first 'anna/album.jpg'); "
        "3 folders without a picture (first 'bert'); keys of the metadata: caption, label\n"
    )


def test_pictures_beside_folders_of_pictures_are_refused(tmp_path):
    for name in ("1.png", "2.png", "class/3.png"):
        save(tmp_path / name)
    message = "holds 2 pictures beside 1 folder of pictures .first 'class'.; expected the pictures"
    with pytest.raises(UserError, match=message):
        image_folder.open_image_folder(tmp_path)
    save(tmp_path / "deep" / "people" / "anna" / "1.png")
    with pytest.raises(UserError, match=r"lie deeper, .* .found 'people/anna'"):
        image_folder.open_image_folder(tmp_path / "deep")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"phone: no picture, but \.heic 1, expected a folder per"):
        image_folder.open_image_folder(tmp_path / "phone")


def test_captions_from_every_place(tmp_path, capsys):
    for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg"):
        for person in ("anna", "bert", "carl", "dora"):
            save(tmp_path / person / name)
    rows = [
        {"file_name": "anna/1.jpg", "text": "A"},
        {"file_name": "./anna/2.jpg", "caption": "B", "role": "reference"},
        {"file_name": "anna\\3.jpg", "prompt": "C"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\r\n".join(map(json.dumps, rows)))
    table = 'file_name,caption,role\n1.jpg,"a, b\nc",\n2.jpg,,target\n'
    (tmp_path / "bert" / "metadata.csv").write_text(table)
    (tmp_path / "carl" / "1.txt").write_text("\n photo of sks \nsecond line\n")
    (tmp_path / "carl" / "2.caption").write_text("two")
    found = image_folder.open_image_folder(tmp_path)
    assert capsys.readouterr().err == ""
    captions = [captions_of(own) for own in found]
    assert captions[0] == {"1.jpg": "A", "2.jpg": "B", "3.jpg": "C", "4.jpg": ""}
    assert captions[1] == {"1.jpg": "a, b\nc", "2.jpg": "", "3.jpg": "", "4.jpg": ""}
    assert captions[2] == {"1.jpg": "photo of sks", "2.jpg": "two", "3.jpg": "", "4.jpg": ""}
    assert [len(own.of_role("target")) for own in found] == [3, 4, 4, 4]
    assert [len(own.of_role("reference")) for own in found] == [4, 3, 4, 4]
    image_folder.open_image_folder(tmp_path / "dora")
    line = f"not read: {tmp_path / 'metadata.jsonl'}, one folder above"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_in_every_encoding(tmp_path, encoding):
    caption = "caf\u00e9\u2028two\u0085three"
    name = unicodedata.normalize("NFD", "zo\u00eb.png")
    save(tmp_path / name)
    row = {"file_name": unicodedata.normalize("NFC", name), "text": caption}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(text, encoding=encoding)
    (folder,) = image_folder.open_image_folder(tmp_path)
    assert captions_of(folder) == {name: caption}


def test_metadata_that_cannot_be_meant_is_named(tmp_path):
    for name in ("anna/a.png", "bert/b.png"):
        save(tmp_path / name)

    def refuse(content, match, name="anna/metadata.jsonl"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UserError, match=match) as error:
            image_folder.open_image_folder(tmp_path)
        assert "\n" not in str(error.value)
        path.unlink()

    row = '{"file_name": "a.png", "text": "x"}\n'
    refuse(row + row, r"jsonl:2: a second row for 'a.png', the first is .*jsonl:1")
    refuse(row.replace('"x"', '"caf\xe9"').encode("latin-1"), r"jsonl:1: found byte 0xe9, .* UTF-8")
    refuse('{"file_name": ["a.png"]}', r"jsonl:1: file_name is \['a.png'\], expected a text")
    refuse("name,text\na.png,x", r"csv: has the columns .* expected file_name", "anna/metadata.csv")
    refuse("file_name,text\na.png,x,y", r"csv:2: has another number", "anna/metadata.csv")
    refuse('{"file_name": "carl/a.png"}', r"no picture of a folder of", "metadata.jsonl")
    refuse('{"file_name": "anna/c.png"}', r"'c.png' is no picture of this", "metadata.jsonl")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "anna/a.png", "text": "y"}')
    refuse(row, r"a second row for 'a.png'")
    refuse("z", r"a\.txt: another caption than that of .*metadata.jsonl:1", "anna/a.txt")
    (tmp_path / "bert" / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match=r"bert/metadata\.jsonl: is a folder, expected a file"):
        image_folder.open_image_folder(tmp_path)


def test_a_lone_index_beside_subjects_makes_no_dataset(tmp_path):
    save(tmp_path / "anna" / "1.png")
    for name in ("index.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert [own.id for own in list_concepts(str(tmp_path), square(8))] == ["anna"]
