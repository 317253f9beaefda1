"""The page and the endpoint as a visitor's program talks to them, over HTTP on this machine."""

import base64
import html
import io
import re
import signal
import tempfile

import numpy as np
import pytest
from PIL import Image

from hyperlora_jax.lora_files import read_metadata
from tests.serve.serving import served

pytest.importorskip("gradio")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(name="server", scope="module")
def _server(place):
    with served(place) as found:
        yield found


@pytest.fixture(name="ask", scope="module")
def _ask(server, place):
    from gradio_client import Client, handle_file

    client = Client(server[1], verbose=False, download_files=str(place / "down"))

    def ask(paths, prompts="smiling mouth", strength=1.0, seed=0):
        files = [handle_file(str(path)) for path in paths]
        return client.predict(files, prompts, strength, seed, api_name="/draw")

    yield ask
    client.close()


def picture(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture(name="post")
def _post(server):
    """Posts a form to the endpoint."""
    import httpx

    with httpx.Client(base_url=server[1], timeout=60) as client:
        yield lambda fields, **files: client.post("v1/draw", data=fields, files=files or None)


def test_a_picture_becomes_pictures_and_three_files(ask, server, place, tmp_path):
    import httpx

    status, shown = ask([picture(place / "anna.png")], "smiling mouth\n<i>red</i>", 0.7, 3)
    assert "ms" in status and "Careful" in status  # noise is no person
    assert shown.count("<img") == 6 and "<i>" not in shown
    links = [html.unescape(link) for link in re.findall("href='([^']+)' download", shown)]
    with httpx.Client(base_url=server[1], timeout=60) as client:
        found = [client.get(link) for link in links]
        lost = client.get(links[0].replace("kohya", "exe")), client.get(f"v1/lora/{'0' * 64}/peft")
    names = [
        re.findall('filename="(.*)"', answer.headers["content-disposition"])[0] for answer in found
    ]
    assert names == ["anna.kohya.safetensors", "anna.diffusers.safetensors", "anna.peft.zip"]
    assert all(len(answer.content) > 10_000 for answer in found)
    (tmp_path / names[0]).write_bytes(found[0].content)
    metadata = read_metadata(tmp_path / names[0])
    assert (metadata["hyperlora.strength"], metadata["hyperlora.seed"]) == ("0.7", "3")
    assert [answer.status_code for answer in lost] == [400, 404]


def test_a_program_gets_what_the_page_shows(ask, post, place):
    content = picture(place / "anna.png").read_bytes()
    fields = {"prompt": ["smiling mouth", "red"], "strength": "0.7", "seed": "3"}
    sheet = post(fields | {"base": "1"}, picture=content)
    assert sheet.headers["content-type"] == "image/png"
    assert float(sheet.headers["x-familiarity"]) < 0.02  # noise is no person
    drawn = np.asarray(Image.open(io.BytesIO(sheet.content))).astype(int)
    assert drawn.shape == (32, 32, 3)
    answer = post(fields | {"format": "json"}, picture=content).json()
    alone = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in answer["pictures"]
    ]
    assert answer["base"] == [] and abs(np.hstack(alone).astype(int) - drawn[:16]).max() <= 1
    _, shown = ask([place / "anna.png"], "smiling mouth\nred", 0.7, 3)
    pages = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))[::12, ::12].astype(int)
        for png in re.findall("base64,([^']+)", shown)
    ]
    assert abs(np.hstack([pages[1], pages[4]]) - drawn[:16]).max() <= 1
    assert abs(np.hstack([pages[2], pages[5]]) - drawn[16:]).max() <= 1
    file = post({"seed": "3", "format": "peft"}, picture=content)
    assert file.content.startswith(b"PK") and file.headers["content-type"] == "application/zip"


def test_what_is_wrong_for_a_program_is_a_line(post, place):
    content = picture(place / "anna.png").read_bytes()
    big = bytes(20 * 1024 * 1024)
    for fields, files, status, said in (
        ({"prompt": "x"}, {"picture": ("a/bad.png", b"text")}, 400, "bad.png: found 4 bytes"),
        ({"prompt": "x"}, {"picture": big}, 413, "more than 20 MB"),
        ({"prompt": "x"}, {}, 400, "expected a form"),
        ({}, {"picture": content}, 400, "found 0 prompts"),
        ({"prompt": "x", "seed": "-1"}, {"picture": content}, 400, "seed is -1"),
        ({"prompt": "x", "strength": "a lot"}, {"picture": content}, 400, "strength is 'a lot'"),
        ({"prompt": "x", "edit:hat": "1"}, {"picture": content}, 400, "unknown field 'edit:hat'"),
        ({"prompt": "x", "format": "gif"}, {"picture": content}, 400, "expected one of png, json"),
        ({"prompt": "x"}, {"prompt": content}, 400, "prompt: expected text"),
    ):
        answer = post(fields, **files)
        assert answer.status_code == status and said in answer.text
        assert answer.text.count("\n") == 1 and str(place) not in answer.text


def test_what_is_wrong_is_a_line(ask, place):
    (place / "bad.png").write_text("text")
    for paths, prompts, said in (
        ([place / "bad.png"], "x", "bad.png: found 4 bytes that are no picture"),
        ([picture(place / "anna.png")], "", "expected 1 to 4, one a line"),
        ([], "x", "no picture yet"),
        ([picture(place / "anna.png")] * 5, "x", "at most 4"),
    ):
        status, shown = ask(paths, prompts)
        assert status.startswith("**Sorry:**") and said in status.replace("\\", "")
        assert "Traceback" not in status and shown == "" and str(place) not in status


def test_the_page_asks_the_internet_for_nothing(server):
    import urllib.request

    text = urllib.request.urlopen(server[1], timeout=30).read().decode()
    loaded = re.findall(
        r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=[\"']?(https?:[^\"' >]+)", text
    )
    assert [address for address in loaded if not address.startswith(server[1])] == []


def test_it_writes_into_its_folder_only_and_leaves_nothing(server, ask, place):
    ask([picture(place / "anna.png")])
    process, _ = server
    own = list((place / "tmp").iterdir())
    assert len(own) == 1 and own[0].name.startswith("hyperlora-serve-")
    assert {path.name for path in place.iterdir()} <= {"tmp", "down", "anna.png", "bad.png"}
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and "Traceback" not in process.stdout.read()
    assert list((place / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "0"], "--port is 0"),
        (["--num_steps", "0"], "--num_steps is 0"),
        (["nowhere"], "checkpoint nowhere: does not exist"),
        (["--directions", "none"], "none"),
    ],
)
def test_wrong_arguments_end_with_2(arguments, said, capsys, monkeypatch, tmp_path):
    from hyperlora_jax.cli.main import run_command

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_command("serve", arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert list(tmp_path.iterdir()) == []
