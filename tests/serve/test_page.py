"""The page as a visitor's program talks to it, over HTTP on this machine."""

import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def test_a_picture_becomes_pictures_and_three_files(ask, place):
    status, shown, *files = ask([picture(place / "anna.png")], "smiling mouth\n<i>red</i>")
    assert "ms" in status and "Careful" in status  # noise is no person
    assert shown.count("<img") == 6 and "<i>" not in shown
    names = [Path(file["value"]).name for file in files]
    assert names == ["anna.kohya.safetensors", "anna.diffusers.safetensors", "anna.peft.zip"]
    assert all(Path(file["value"]).stat().st_size > 10_000 for file in files)


def test_what_is_wrong_is_a_line(ask, place):
    (place / "bad.png").write_text("text")
    for paths, prompts, said in (
        ([place / "bad.png"], "x", "bad.png: found 4 bytes that are no picture"),
        ([picture(place / "anna.png")], "", "expected 1 to 4, one a line"),
        ([], "x", "no picture yet"),
        ([picture(place / "anna.png")] * 5, "x", "at most 4"),
    ):
        status, shown, *files = ask(paths, prompts)
        assert status.startswith("**Sorry:**") and said in status.replace("\\", "")
        assert "Traceback" not in status and shown == "" and str(place) not in status
        assert not any(file["interactive"] or file["value"] for file in files)


def test_the_page_asks_the_internet_for_nothing(server):
    import re
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
