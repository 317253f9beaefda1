"""A trained hypernetwork as people use it: restore, generate, save.

    hyper = Hypernetwork.restore("runs/avatars")
    loras = hyper.generate(key, references)           # one LoRA tree with a leading axis l

The folder holds `config.json` (architecture, LoraSpec, base hash, encoder, default strength),
`model.safetensors` (float32 parameters) and `encoder/` when the encoder is one of ours.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from hyperlora_jax.array_types import AnyArray, Array, Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet import conditioning
from hyperlora_jax.hypernet.hypernetwork import TokenHypernetwork
from hyperlora_jax.hypernet.token_layout import make_layout
from hyperlora_jax.lora.sites import LoraSpec

FORMAT = "hyperlora-hypernetwork"
FOLDER = "hypernetwork"


@dataclasses.dataclass(frozen=True, eq=False)
class Hypernetwork:
    """Reference pictures → LoRAs.

    Attributes:
        net, params: the network and its parameters.
        encoder: turns pictures into condition embeddings.
        facts: JSON-able; `base_hash` and `base` say which model the LoRAs are for,
            `default_strength` was chosen on validation identities, `trained_on` lists identities.
        model_kwargs: how `net` is built again.
    """

    net: TokenHypernetwork
    params: Params
    encoder: Any
    facts: Mapping[str, Any]
    model_kwargs: Mapping[str, Any]

    @property
    def spec(self) -> LoraSpec:
        """The sites that generated LoRAs adapt."""
        return self.net.layout.spec

    @property
    def default_strength(self) -> float:
        """Strength at which generated LoRAs are best, chosen on validation identities."""
        return float(self.facts.get("default_strength", 1.0))

    def generate(self, key: Array, references: AnyArray) -> Params:
        """LoRAs from reference pictures.

        Args:
            key: randomness of generators that sample; a regression ignores it.
            references: [l, h, w, 3] one picture per subject, or [l, k, h, w, 3] several, in [0, 1].

        Returns:
            Folded LoRA tree with leading axis l, float32.
        """
        references = jnp.asarray(references)
        if references.ndim == 4:
            references = references[:, None]
        num_loras, num_references = references.shape[:2]
        images = references.reshape(-1, *references.shape[2:])
        pooled, tokens = self.encoder.encode(images)
        pooled = jnp.reshape(pooled, (num_loras, num_references, *pooled.shape[1:]))
        tokens = jnp.reshape(tokens, (num_loras, num_references, *tokens.shape[1:]))
        return self.write(key, pooled, tokens)

    def write(self, key: Array, pooled: Array, tokens: Array) -> Params:
        """LoRAs from embeddings: pooled [l, k, e], tokens [l, k, m, e]."""
        del key
        return _write(self.net, self.params, pooled, tokens)

    def save(self, path: epath.PathLike) -> None:
        """Writes the folder; each file appears whole or not at all."""
        folder = epath.Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        encoder: dict[str, Any] = {"name": self.encoder.name, "hash": self.encoder.hash}
        if isinstance(self.encoder, conditioning.FlaxImageEncoder):
            # Kept in float32, so its hash is that of the copy, whatever the original's dtype was.
            encoder["hash"] = conditioning.save_encoder(
                folder / "encoder",
                self.encoder.module,
                self.encoder.params,
                self.encoder.name,
                self.encoder.facts,
                dtype="float32",
            )
        config = {
            "format": FORMAT,
            "model": dict(self.model_kwargs),
            "spec": json.loads(self.spec.to_json()),
            "encoder": encoder,
            "facts": dict(self.facts),
        }
        flat = traverse_util.flatten_dict(dict(self.params), sep="/")
        arrays = {k: np.ascontiguousarray(jax.device_get(v)) for k, v in flat.items()}
        _replace(folder / "model.safetensors", save_safetensors(arrays))
        _replace(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())

    @classmethod
    def restore(cls, path: epath.PathLike, encoder: Any = None) -> "Hypernetwork":
        """Reads what `save` wrote; `path` may be the folder or the workdir of `hyperlora train`.

        Args:
            encoder: needed when the encoder was not one of ours (ONNX file, transformers model).

        Raises:
            UserError: no such folder, not a hypernetwork, damaged files, another encoder.
        """
        folder = _find(epath.Path(path))
        try:
            config = json.loads((folder / "config.json").read_text())
            arrays = load_safetensors((folder / "model.safetensors").read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {folder}: cannot be read ({error})") from error
        except Exception as error:  # SafetensorError is no ValueError
            raise UserError(f"checkpoint {folder}/model.safetensors: damaged ({error})") from error
        if config.get("format") != FORMAT:
            raise UserError(
                f"checkpoint {folder}: config.json is of format {config.get('format')!r}, "
                f"expected {FORMAT!r}"
            )
        spec = LoraSpec.from_json(json.dumps(config["spec"]))
        net = build_network(spec, config["model"])
        if encoder is None and not (folder / "encoder").exists():
            raise UserError(
                f"checkpoint {folder}: was trained with the encoder {config['encoder']['name']!r}, "
                "which is not stored with it; name it by --encoder"
            )
        encoder = encoder or conditioning.load_encoder(folder / "encoder")
        if encoder.hash != config["encoder"]["hash"]:
            raise UserError(
                f"checkpoint {folder}: expects encoder {config['encoder']['name']} "
                f"({config['encoder']['hash'][:12]}), got {encoder.name} ({encoder.hash[:12]})"
            )
        params = traverse_util.unflatten_dict(
            {name: jnp.asarray(value) for name, value in arrays.items()}, sep="/"
        )
        return cls(net, params, encoder, config["facts"], config["model"])


def build_network(spec: LoraSpec, model: Mapping[str, Any]) -> TokenHypernetwork:
    """The network of a config's `model` section (keyword arguments of TokenHypernetwork, and
    `components_per_token`)."""
    kwargs = dict(model)
    layout = make_layout(spec, kwargs.pop("components_per_token", None))
    try:
        return TokenHypernetwork(layout=layout, **kwargs)
    except TypeError as error:
        raise UserError(f"config.model: {error}") from error


@functools.partial(jax.jit, static_argnames="net")
def _write(net: TokenHypernetwork, params: Params, pooled: Array, tokens: Array) -> Params:
    merged = tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])
    return net.apply({"params": params}, jnp.mean(pooled, axis=1), merged)


def _find(path: epath.Path) -> epath.Path:
    for folder in (path, path / FOLDER):
        if (folder / "model.safetensors").exists() and (folder / "config.json").exists():
            return folder
    state = "has none" if path.exists() else "does not exist"
    raise UserError(
        f"checkpoint {path}: {state}; expected a folder with config.json and model.safetensors, "
        "or the workdir of a finished `hyperlora train`"
    )


def _replace(path: epath.Path, data: bytes) -> None:
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
