"""The page: a Gradio app around a `Studio`, without anything from the internet."""

import asyncio
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from hyperlora_jax.array_types import UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.serve import endpoint, requests
from hyperlora_jax.serve.studio import Studio
from hyperlora_jax.shipped import BASES, shipped_path

if TYPE_CHECKING:
    import gradio

KEPT_SECONDS = 1800  # how long uploads and LoRAs stay
EXAMPLES = "example-people"  # drawn, none of them trained on
PROMPTS = {
    "tiny-sd": """smiling mouth wide eyes no glasses blue striped clothes yellow background
toothy mouth keen eyes round glasses green plain clothes blue background
frowning mouth tired eyes no glasses red dotted clothes gray background""",
    "": "a portrait photo\nreading a book in a cafe\nas an astronaut",
}
HINTS = {"tiny-sd": "This base knows drawn people of 16 × 16 pixels, and captions of this form."}
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.sides { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px 8px; }
.sides img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  border-radius: 4px; margin: 0; }
.sides .head { font-weight: 600; text-align: center; }
.sides .prompt { grid-column: 1 / -1; margin-top: 6px; overflow-wrap: anywhere; }
.downloads { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 12px; }
.downloads a { flex: 1 1 90px; padding: 6px 8px; text-align: center; text-decoration: none;
  border: 1px solid var(--border-color-primary); border-radius: 4px;
  background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color) !important; }
#status p { margin: 0; }
"""
INTRODUCTION = """# A LoRA from one picture
Drop a picture of somebody. A small file, the **LoRA**, is written in one pass; with it the picture
model ("{base}", which has never seen this person) draws them under every prompt below."""


def build(studio: Studio, base: str, temporary: Path) -> "gradio.Blocks":
    """The page; `temporary` is the folder that everything is written to.

    Its events go past Gradio's queue (which costs several messages each): the batches' queue is the
    one that is bounded.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = _gradio(temporary)

    async def answer(*given: object) -> tuple[str, str]:
        return await respond(studio, temporary, *given)

    with gr.Blocks(
        title="A LoRA from one picture",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS // 3, KEPT_SECONDS),
    ) as page:
        gr.Markdown(INTRODUCTION.format(base=base))
        with gr.Row():
            with gr.Column(min_width=300):
                pictures = gr.File(
                    label=f"Pictures of one person, up to {requests.MOST_PICTURES}",
                    file_count="multiple",
                    height=140,
                    elem_id="pictures",
                )
                if base in BASES:
                    people = sorted(map(str, shipped_path(EXAMPLES).glob("*.png")))
                    gr.Examples(
                        [[[person]] for person in people], [pictures], elem_id="people",
                        label="No picture at hand? Somebody drawn",
                        example_labels=[f"person {k + 1}" for k in range(len(people))],
                        api_visibility="private",
                    )  # fmt: skip
                prompts = gr.Textbox(
                    PROMPTS.get(base, PROMPTS[""]),
                    label=f"Prompts, one a line, up to {requests.MOST_PROMPTS}",
                    info=HINTS.get(base),
                    lines=6,
                    max_lines=8,
                    elem_id="prompts",
                )
                strength = gr.Slider(
                    0, requests.MOST_STRENGTH, studio.hyper.default_strength, step=0.05,
                    label="Strength of the LoRA", elem_id="strength",
                )  # fmt: skip
                seed = gr.Slider(0, 999, 0, step=1, label="Seed", elem_id="seed")
                amounts = [
                    gr.Slider(-requests.EDIT, requests.EDIT, 0, step=0.1, label=f"Edit: {name}")
                    for name in studio.names
                ]
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(min_width=300):
                status = gr.Markdown(
                    "Drop a picture, and the pictures drawn with its LoRA appear here.",
                    elem_id="status",
                )
                shown = gr.HTML(elem_id="shown")
        options = {
            "inputs": [pictures, prompts, strength, seed, *amounts],
            "outputs": [status, shown],
            "show_progress": "minimal",
            "queue": False,
        }
        pictures.change(answer, api_name="draw", **options)
        changes = [button.click, prompts.submit]
        changes += [slider.release for slider in (strength, seed, *amounts)]
        for change in changes:
            change(answer, trigger_mode="always_last", api_visibility="private", **options)
    return page


async def respond(
    studio: Studio,
    temporary: Path,
    paths: list[str] | None,
    text: str,
    strength: float | int | None,
    seed: float | int | None,
    *amounts: float | int | None,
) -> tuple[str, str]:
    """New texts of (status, pictures and downloads); what is wrong is said in the status.

    Args:
        paths: uploaded files.
        text: a prompt a line.
        amounts: of the studio's directions.
    """
    try:
        strong = requests.number(strength, "strength", 0.0, requests.MOST_STRENGTH)
        whole = int(requests.number(seed, "seed", 0.0, float(requests.MOST_SEED)))
        edits = {
            name: requests.number(amount, name, -requests.EDIT, requests.EDIT)
            for name, amount in zip(studio.names, amounts, strict=True)
        }
        pixels = await asyncio.to_thread(_read, paths or [], studio)
        prompts = requests.read_prompts(text or "")
        [subject] = await endpoint.results([studio.writing(pixels, whole)])
        images = await endpoint.results(studio.drawing(subject, prompts, strong, whole, edits))
    except UserError as error:
        return f"**Sorry:** {_plain(str(error))}", ""
    numbers = {"strength": strong, "seed": whole}
    numbers |= {f"{endpoint.EDITED}{name}": amount for name, amount in edits.items()}

    def shown() -> str:
        table = requests.table(pixels, prompts, images[: len(prompts)], images[len(prompts) :])
        key = endpoint.keep(subject, temporary / "written")
        return table + requests.links(key, Path((paths or [""])[0]).name, numbers)

    return requests.about(subject), await asyncio.to_thread(shown)


def _read(paths: list[str], studio: Studio) -> list[UInt8[np.ndarray, "h w 3"]]:
    files = [Path(path) for path in paths[: requests.MOST_PICTURES + 1]]
    try:
        return requests.read_pictures([(file.name, file.read_bytes()) for file in files], studio)
    except OSError as error:
        raise UserError(f"an uploaded file cannot be read ({error.strerror})") from None


def _plain(text: str) -> str:
    """Text as it is, in Markdown."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#!|" else letter for letter in text)


class Served:
    """The page on a port, until `close`.

    Args:
        host: address to listen on; 127.0.0.1 is this machine alone.

    Raises:
        UserError: Gradio is not installed, or the port is taken.
    """

    def __init__(self, studio: Studio, base: str, host: str, port: int) -> None:
        self._studio = studio
        self.temporary = Path(tempfile.mkdtemp(prefix="hyperlora-serve-"))
        self._ended = threading.Event()
        try:
            (self.temporary / "written").mkdir()
            self._page = build(studio, base, self.temporary)
            import gradio as gr

            app, self.url, _ = self._page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                inbrowser=False,
                ssr_mode=False,
                show_error=True,
                max_file_size=endpoint.MOST_BYTES,
                enable_monitoring=False,
                footer_links=[],
                mcp_server=False,
                css=CSS,
                theme=gr.themes.Base(
                    font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
                ),
            )
            app.routes.extend(endpoint.routes(studio, self.temporary / "written"))
        except OSError:
            self.close()
            raise UserError(
                f"--host {host} --port {port}: cannot be listened on, is another program there? "
                "name another --port"
            ) from None
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._clean, daemon=True, name="clean").start()

    def close(self) -> None:
        """Ends the page and removes its folder."""
        self._ended.set()
        if hasattr(self, "_page"):
            self._page.close(verbose=False)
        self._studio.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _clean(self) -> None:
        """Removes what was uploaded and written long ago."""
        written = self.temporary / "written"
        while not self._ended.wait(60):
            for path in [*self.temporary.iterdir(), *written.iterdir()]:
                if path != written and time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _gradio(temporary: Path) -> ModuleType:
    """The library, told to keep to itself and to the folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # visitors' faces, in their browsers
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"serve: {error.name} is not installed: pip install hyperlora-jax[serve]"
        ) from None
    return gradio
