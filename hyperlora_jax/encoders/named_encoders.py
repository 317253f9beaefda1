"""Condition encoders by path or short name: which reader a file or folder is for.

folder with our config.json         `FlaxImageEncoder`, written by `save_encoder`
*.onnx                              any ONNX image model (`foreign_encoders.py`; onnxruntime)
folder of a CLIP vision encoder     CLIPVisionModel(WithProjection), or the vision encoder of a
                                    CLIPModel, in Flax (`clip_encoder.py`)
folder with a transformers model    any other vision model that AutoModel reads (torch)
"""

import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from hyperlora_jax import storage
from hyperlora_jax.encoders import clip_encoder, condition_encoders, foreign_encoders, preprocessing
from hyperlora_jax.encoders.condition_encoders import CLIP, ONNX, OURS, TRANSFORMERS, ImageEncoder
from hyperlora_jax.errors import UserError

SHIPPED = {"avatar": "avatar-encoder"}  # short name -> folder in hyperlora_jax/assets


def load_condition_encoder(source: str | epath.PathLike, **options: Any) -> ImageEncoder:
    """Any condition encoder by path, or by the short name of a shipped one (`avatar`).

    Args:
      source: see the table at the top of this file.
      **options: mean, std and image_size of a foreign encoder, see `preprocessing.py`.

    Raises:
      UserError: no such path, an unknown kind, or a file that the reader refuses.
    """
    path = epath.Path(source)
    if str(source) in SHIPPED:
        path = epath.resource_path("hyperlora_jax") / "assets" / SHIPPED[str(source)]
    elif path.parts[:1] == ("~",):
        path = path.expanduser()
    if not path.exists():
        raise UserError(
            f"encoder {source}: no such file or folder, expected one of {sorted(SHIPPED)}, "
            "a model folder, or an .onnx file"
        )
    local = epath.Path(storage.fetched(path))
    kind = kind_of(local)
    given = preprocessing.checked_options(source, options)
    if kind == OURS and given:
        raise UserError(f"encoder {source}: is one of ours, takes no {', '.join(given)}")
    readers = {
        OURS: condition_encoders.load_encoder,
        CLIP: clip_encoder.load_clip_vision,
        ONNX: foreign_encoders.load_onnx,
        TRANSFORMERS: foreign_encoders.load_transformers,
    }
    return dataclasses.replace(readers[kind](local, **given), source=str(storage.absolute(path)))


def kind_of(path: epath.Path) -> str:
    """OURS, CLIP, ONNX or TRANSFORMERS.

    Raises:
      UserError: a file of another kind, or a folder without a config.json.
    """
    if path.is_dir():
        config = condition_encoders.read_config(path)
        if config.get("format") == condition_encoders.FORMAT:
            return OURS
        return CLIP if clip_encoder.is_clip_vision(config) else TRANSFORMERS
    if path.suffix == ".onnx":
        return ONNX
    raise UserError(
        f"encoder {path}: found a {path.suffix or 'suffix-less'} file, "
        "expected .onnx or a model folder"
    )


def configured_encoder(model: ConfigDict, path: str | None = None) -> ImageEncoder:
    """The encoder of a config's section `model`: `encoder` (or `path` in its place) with
    `encoder_options`, which runs begun by an older version do not have."""
    return load_condition_encoder(path or model.encoder, **model.get("encoder_options", {}))
