"""The page's work for programs, by HTTP: pictures and words in, pictures or a LoRA file out.

    curl -F picture=@me.jpg -F prompt="a portrait photo" http://127.0.0.1:7860/v1/draw -o me.png

Fields of the form: `picture` and `prompt` (1 to 4 times each), and as one likes `strength`, `seed`,
`base` (1: the base's pictures too), `edit:NAME` for a direction, and `format`: "png" (all pictures
side by side, the base's below them), "json" (base64 PNGs, familiarity), or the LoRA alone as
"kohya", "diffusers" or "peft", which takes no prompt. What is wrong is said in one line of text:
400, 413 above `MOST_BYTES`, 404, 503 when too many wait. Requests share the page's batches.
"""

import asyncio
import base64
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from hyperlora_jax.array_types import Json, JsonDict, UInt8
from hyperlora_jax.errors import UserError
from hyperlora_jax.pictures.pictures import encode_png
from hyperlora_jax.serve import requests
from hyperlora_jax.serve.batcher import Busy
from hyperlora_jax.serve.studio import Studio, Subject

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

MOST_BYTES = 20 * 1024 * 1024  # of all pictures of a request
FORMATS = ("png", "json", *requests.FORMATS)
FIELDS = ("picture", "prompt", "strength", "seed", "base", "format")
EDITED = "edit:"  # how a direction's field begins


async def results(futures: Iterable[Future]) -> list:
    """What a batcher's futures become. Somebody who leaves cancels nothing: they may be shared."""
    return await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(one)) for one in futures))


def routes(studio: Studio, written: Path) -> "list[Route]":
    """POST /v1/draw, and GET /v1/lora/KEY/FORM of a LoRA that the page showed (`keep`).

    Args:
        written: a folder for what is kept and for files while they are sent.
    """
    from starlette.routing import Route

    async def draw(request: "Request") -> "Response":
        return await _answer(studio, written, request)

    async def lora(request: "Request") -> "Response":
        return await _kept_file(studio, written, request)

    return [
        Route("/v1/draw", _in_a_line(draw), methods=["POST"]),
        Route("/v1/lora/{key}/{form}", _in_a_line(lora)),
    ]


def keep(subject: Subject, written: Path) -> str:
    """The key under which a LoRA can be fetched as a file later."""
    key = hashlib.sha256(subject.vector.tobytes()).hexdigest()
    path = written / f"{key}.npy"
    if path.exists():
        path.touch()  # its time begins again
    else:
        with tempfile.NamedTemporaryFile(dir=written, delete=False) as file:
            np.save(file, subject.vector)
        Path(file.name).replace(path)
    return key


def _in_a_line(
    handler: "Callable[[Request], Awaitable[Response]]",
) -> "Callable[[Request], Awaitable[Response]]":
    """The same with errors as a line of text."""

    async def handled(request: "Request") -> "Response":
        from starlette.responses import PlainTextResponse

        try:
            return await handler(request)
        except Busy as error:
            return PlainTextResponse(f"{error}\n", 503, {"Retry-After": "1"})
        except _Other as error:
            return PlainTextResponse(f"{error}\n", error.status)
        except UserError as error:
            return PlainTextResponse(f"{error}\n", 400)

    return handled


class _Other(UserError):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


async def _answer(studio: Studio, written: Path, request: "Request") -> "Response":
    from starlette.responses import JSONResponse, Response

    given, pictures = await _form(studio, request)
    form = given["format"][-1] if "format" in given else "png"
    if form not in FORMATS:
        raise UserError(f"format is {form!r}, expected one of {', '.join(FORMATS)}")
    draws = form in FORMATS[:2]
    prompts = requests.read_prompts("\n".join(given.get("prompt", ()))) if draws else []
    numbers = _numbers(studio, {name: values[-1] for name, values in given.items()})
    pixels = await asyncio.to_thread(requests.read_pictures, pictures, studio)
    [subject] = await results([studio.writing(pixels, numbers["seed"])])
    if not draws:
        name = requests.file_name(pictures[0][0], form)
        return await _file(studio, written, subject, form, name, numbers)
    with_base = given.get("base", ["0"])[-1] not in ("", "0", "false")
    images = await results(studio.drawing(subject, prompts, **numbers, base=with_base))
    if form == "png":
        rows = [images[: len(prompts)], images[len(prompts) :]]
        sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows if row])
        headers = {"X-LoRA-Milliseconds": f"{1000 * subject.seconds:.1f}"}
        if subject.familiarity is not None:
            headers["X-Familiarity"] = f"{subject.familiarity:.3f}"
        return Response(await asyncio.to_thread(_png, sheet), 200, headers, "image/png")
    encoded = await asyncio.to_thread(lambda: [base64.b64encode(_png(x)).decode() for x in images])
    return JSONResponse(
        {
            "familiarity": subject.familiarity,
            "lora_seconds": subject.seconds,
            "pictures": encoded[: len(prompts)],
            "base": encoded[len(prompts) :],
        }
    )


async def _kept_file(studio: Studio, written: Path, request: "Request") -> "Response":
    key, form = request.path_params["key"], request.path_params["form"]
    if form not in requests.FORMATS:
        raise UserError(f"form is {form!r}, expected one of {', '.join(requests.FORMATS)}")
    path = written / f"{key}.npy"
    if len(key) != 64 or not key.isalnum() or not path.is_file():
        raise _Other(404, "this LoRA is no longer there; draw again")
    subject = Subject(await asyncio.to_thread(np.load, path), None, 0.0)
    given = dict(request.query_params)
    name = requests.file_name(given.pop("name", ""), form)
    return await _file(studio, written, subject, form, name, _numbers(studio, given))


async def _file(
    studio: Studio,
    written: Path,
    subject: Subject,
    form: str,
    name: str,
    numbers: Json,
) -> "Response":
    from starlette.responses import Response

    def content() -> bytes:
        with tempfile.TemporaryDirectory(dir=written) as folder:
            return requests.lora_file(studio, subject, Path(folder), form, **numbers).read_bytes()

    named = f'filename="{name}"' if name.isascii() else f"filename*=utf-8''{quote(name)}"
    headers = {"Content-Disposition": f"attachment; {named}"}
    kind = "application/zip" if form == "peft" else "application/octet-stream"
    return Response(await asyncio.to_thread(content), 200, headers, kind)


def _png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    return encode_png(image, requests.PNG_LEVEL)


def _numbers(studio: Studio, given: Mapping[str, str]) -> JsonDict:
    """Strength, seed and edits of texts by name."""

    def number(name: str, default: float, low: float, high: float) -> float:
        try:
            value = float(given.get(name, default))
        except ValueError:
            raise UserError(f"{name} is {given[name]!r}, expected a number") from None
        return requests.number(value, name, low, high)

    return {
        "strength": number("strength", studio.hyper.default_strength, 0.0, requests.MOST_STRENGTH),
        "seed": int(number("seed", 0, 0.0, float(requests.MOST_SEED))),
        "edits": {
            name.removeprefix(EDITED): number(name, 0.0, -requests.EDIT, requests.EDIT)
            for name in given
            if name.startswith(EDITED)
        },
    }


async def _form(
    studio: Studio, request: "Request"
) -> tuple[dict[str, list[str]], list[tuple[str, bytes]]]:
    """Texts by field, and pictures (name, content), all of it in memory."""
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def bounded() -> AsyncIterator[bytes]:
        count = 0
        async for chunk in request.stream():
            count += len(chunk)
            if count > MOST_BYTES:
                raise _Other(413, f"more than {MOST_BYTES >> 20} MB, which is the most")
            yield chunk

    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("expected a form with files (multipart/form-data), as curl -F sends it")
    parser = MultiPartParser(request.headers, bounded(), max_files=16, max_fields=64)
    parser.spool_max_size = MOST_BYTES + 1  # nothing goes to a disk
    try:
        items = (await parser.parse()).multi_items()
    except (MultiPartException, KeyError) as error:
        raise UserError(f"the form cannot be read ({error})") from None
    texts: dict[str, list[str]] = {}
    pictures = []
    for name, value in items:
        if name not in FIELDS and name.removeprefix(EDITED) not in studio.names:
            fields = [*FIELDS, *(f"{EDITED}{own}" for own in studio.names)]
            raise UserError(f"unknown field {name!r}, expected {', '.join(fields)}")
        if isinstance(value, str) == (name == "picture"):
            raise UserError(f"{name}: expected {'a file' if name == 'picture' else 'text'}")
        if isinstance(value, str):
            texts.setdefault(name, []).append(value)
        else:
            pictures.append((Path(value.filename or "picture").name, await value.read()))
    return texts, pictures
