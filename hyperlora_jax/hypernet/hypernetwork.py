"""A trained hypernetwork as people use it: restore, generate, save.

    hyper = Hypernetwork.restore("runs/avatars")
    loras = hyper.generate(key, ["anna.jpg"])         # one LoRA tree with a leading axis l
    hyper.save_lora("anna.safetensors", loras)

The folder holds `config.json` (architecture, LoraSpec, base hash, encoder, defaults of sampling),
`model.safetensors` (parameters, float32 once they are read, and constants under "constants/") and
`encoder/` when the encoder is one of ours or a CLIP (`stored_encoder.py`).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from hyperlora_jax import lora_files, storage
from hyperlora_jax.array_types import AnyArray, Array, Float, Json, Params
from hyperlora_jax.encoders import condition_encoders, stored_encoder
from hyperlora_jax.encoders.condition_encoders import ImageEncoder
from hyperlora_jax.encoders.image_encoder import ConvEncoder
from hyperlora_jax.errors import UserError
from hyperlora_jax.hypernet import familiarity
from hyperlora_jax.hypernet.building import build_generator
from hyperlora_jax.hypernet.condition import merge_references, repeated
from hyperlora_jax.hypernet.generators import Draw, Generator
from hyperlora_jax.lora import factors
from hyperlora_jax.lora.sites import LoraSpec
from hyperlora_jax.pictures.references import by_number
from hyperlora_jax.shipped import checkpoint_path

FORMAT = "hyperlora-hypernetwork"
FOLDER = "hypernetwork"


@dataclasses.dataclass(frozen=True, eq=False)
class Hypernetwork:
    """Reference pictures → LoRAs.

    Attributes:
        generator: condition → LoRA.
        params: its trained parameters.
        encoder: turns pictures into condition embeddings.
        facts: JSON-able; `base_hash` and `base` say which model the LoRAs are for,
            `default_strength` was chosen on validation identities, `generate` holds the other
            defaults of sampling (`Draw`), `trained_on` lists identities.
        model: how `generator` is built again, see `building.build_generator`.
        constants: arrays that the generator reads and nobody trains.
    """

    generator: Generator
    params: Params
    encoder: ImageEncoder
    facts: Json
    model: Json
    constants: Params = dataclasses.field(default_factory=dict)

    @property
    def spec(self) -> LoraSpec:
        """The sites that generated LoRAs adapt."""
        return self.generator.spec

    @property
    def default_strength(self) -> float:
        """Strength at which generated LoRAs are best, chosen on validation identities."""
        return float(self.facts.get("default_strength", 1.0))

    @property
    def default_draw(self) -> Draw:
        """Guidance, steps and sampler that `generate` uses unless told otherwise."""
        settings = dict(self.facts.get("generate", {}))
        return Draw(**{name: settings[name] for name in Draw._fields if name in settings})

    def with_facts(self, **facts: object) -> "Hypernetwork":
        """The same with more facts."""
        return dataclasses.replace(self, facts={**self.facts, **facts})

    def __repr__(self) -> str:
        kind = self.model.get("generator", "regression")
        return (
            f"Hypernetwork({kind} of {sum(leaf.size for leaf in jax.tree.leaves(self.params)):,} "
            f"parameters, encoder {self.encoder.name!r}, base {self.facts.get('base', '?')!r}, "
            f"default_strength={self.default_strength:g}, spec={self.spec!r})"
        )

    def generate(
        self,
        key: Array | int,
        references: object,
        *,
        strength: float | None = None,
        num_samples: int = 1,
        **draw: Any,
    ) -> Params:
        """LoRAs from reference pictures.

        Args:
            key: randomness, or a seed, of generators that sample; a regression ignores it.
            references: a picture, a list with one per subject, or a list of lists with several per
                subject: paths, Pillow pictures, uint8 arrays or floats in [0, 1]; or one array
                [l, h, w, 3] or [l, k, h, w, 3]. See `pictures/references.py`.
            strength: what every delta is multiplied by; None means `default_strength`.
            num_samples: LoRAs per subject.
            **draw: `guidance`, `num_steps`, `sampler`; the checkpoint's own where not given.

        Returns:
            Folded LoRA tree with leading axis l · num_samples (a subject's samples in a row),
            float32.

        Raises:
            UserError: something that is no picture; several samples of a generator that always
                answers the same, or guidance of one that was trained without condition dropout.
        """
        settings, drawn = self._draw(num_samples, draw), self._key(key)
        groups = by_number(references, self.encoder)
        parts, places = [], []
        for number, (members, pixels) in enumerate(groups):
            # Subjects with equally many pictures need no other key than they had alone.
            sampled = number and self.generator.stochastic
            own_key = jax.random.fold_in(drawn, number) if sampled else drawn
            parts.append(self._of_pixels(own_key, pixels, num_samples, settings))
            places += [n * num_samples + k for n in members for k in range(num_samples)]
        loras = parts[0]
        if len(parts) > 1:
            order = np.argsort(places)
            loras = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *parts)
        strength = self.default_strength if strength is None else strength
        return loras if strength == 1.0 else factors.scale(loras, strength)

    def _key(self, key: Array | int) -> AnyArray:
        """Zeros where nobody looks at it: to make a key is a program of its own."""
        if not self.generator.stochastic:
            return np.zeros(2, np.uint32)
        return jax.random.key(key) if isinstance(key, int) else key

    def _of_pixels(
        self, key: AnyArray, pixels: AnyArray, num_samples: int, settings: Draw
    ) -> Params:
        if not isinstance(self.encoder, condition_encoders.FlaxImageEncoder):
            return self._write(key, *self._embed(pixels), num_samples, settings)
        weights = self.params, self._constants, self.encoder.params
        return _generate(
            self.generator, self.encoder.module, weights,
            jnp.asarray(pixels), key, num_samples, settings,
        )  # fmt: skip

    def embed(self, references: object) -> tuple[Array, Array]:
        """Pooled [l, k, e] and tokens [l, k, m, e] of subjects with k pictures each; `references`
        as in `generate`.

        Raises:
            UserError: subjects with different numbers of pictures; see also `generate`.
        """
        groups = by_number(references, self.encoder)
        if len(groups) > 1:
            counts = [pixels.shape[1] for _, pixels in groups]
            raise UserError(
                f"references: subjects have {counts} pictures, expected one number for all"
            )
        return self._embed(groups[0][1])

    def _embed(self, pixels: Float[AnyArray, "l k h w 3"]) -> tuple[Array, Array]:
        if isinstance(self.encoder, condition_encoders.FlaxImageEncoder):
            return _embed(self.encoder.module, self.encoder.params, jnp.asarray(pixels))
        return _embedded(self.encoder.encode, jnp.asarray(pixels))

    def familiarity(self, references: object) -> Float[np.ndarray, " l"] | None:
        """How well each subject's references fit what the hypernetwork was trained on, 0 (unlike
        all training subjects) to 1; None for a checkpoint that does not know. See
        `hypernet/familiarity.py`; `references` as in `generate`."""
        groups = by_number(references, self.encoder)
        familiarities = np.empty(sum(len(members) for members, _ in groups))
        for members, pixels in groups:
            pooled, _ = self._embed(pixels)
            scores = self.familiarity_of(pooled)
            if scores is None:
                return None
            familiarities[members] = scores
        return familiarities

    def familiarity_of(self, pooled: Float[AnyArray, "l k e"]) -> Float[np.ndarray, " l"] | None:
        """`familiarity` of subjects that are embedded already."""
        if "familiarity" not in self.constants:
            return None
        return familiarity.score(self.constants["familiarity"], pooled)

    @property
    def provenance(self) -> Json:
        """Header texts of the files of its LoRAs: base, encoder, generator."""
        base = {name: self.facts[name] for name in ("base", "base_hash") if name in self.facts}
        return {
            **base,
            "encoder": json.dumps(stored_encoder.describe(self.encoder)),
            "encoder_hash": self.encoder.hash,
            "generator": self.model.get("generator", "regression"),
            "training_steps": self.facts.get("num_steps", 0),
        }

    def save_lora(
        self,
        path: str | os.PathLike[str],
        lora: Params,
        format: str | None = None,
        dtype: str = "float16",
        **metadata: object,
    ) -> Path | epath.Path:
        """Writes one LoRA of this hypernetwork for other programs; returns the file's path.

        Args:
            path: the file; `.safetensors` is added where it has no suffix, see `save_lora`.
            lora: a single LoRA, or a batch of one as `generate` gives it.
            format: "kohya", "diffusers", "peft", "weights2weights"; None: the checkpoint's own.
            **metadata: more texts for the header.

        Raises:
            UserError: a batch of several (see `hyperlora_jax.save_loras`); as `save_lora` does.
        """
        count = factors.num_loras(lora)
        if count is not None and count != 1:
            raise UserError(
                f"save_lora: found a batch of {count} LoRAs for the file {path}, expected one; "
                "jax.tree.map(lambda leaf: leaf[k], loras) is the k-th"
            )
        return lora_files.save_lora(
            path,
            lora if count is None else factors.index(lora, 0),
            self.spec,
            format=format or self.facts.get("generate", {}).get("format", "kohya"),
            dtype=dtype,
            family=self.facts.get("family"),
            metadata={**self.provenance, **metadata},
        )

    def write(
        self,
        key: Array | int,
        pooled: Array,
        tokens: Array,
        *,
        num_samples: int = 1,
        **draw: Any,
    ) -> Params:
        """LoRAs from embeddings: pooled [l, k, e], tokens [l, k, m, e]; see `generate`."""
        settings = self._draw(num_samples, draw)
        return self._write(self._key(key), pooled, tokens, num_samples, settings)

    def check_base(self, sd: Any, name: str) -> None:
        """Raises UserError unless the LoRAs are for this base model, called `name`."""
        wanted = self.facts.get("base_hash")
        if wanted != sd.base_hash:
            raise UserError(
                f"base {name}: its UNet has the hash {sd.base_hash[:12]}, but the hypernetwork was "
                f"trained on {self.facts.get('base')} with {str(wanted)[:12]}"
            )

    @property
    def _constants(self) -> Params:
        return {k: v for k, v in self.constants.items() if k != "familiarity"}

    def _write(
        self, key: AnyArray, pooled: Array, tokens: Array, num_samples: int, draw: Draw
    ) -> Params:
        return _write(
            self.generator, self.params, self._constants, pooled, tokens, key, num_samples, draw
        )

    def _draw(self, num_samples: int, given: Mapping[str, object]) -> Draw:
        """The settings of one call; UserError for more samples than the generator can draw."""
        if num_samples != 1 and not (num_samples > 1 and self.generator.stochastic):
            raise UserError(
                f"num_samples is {num_samples}, but this checkpoint's generator "
                f"({self.model.get('generator', 'regression')}) "
                + (
                    "samples; expected 1 or more"
                    if self.generator.stochastic
                    else "writes the same LoRA every time; expected 1"
                )
            )
        return self.default_draw._replace(**{k: v for k, v in given.items() if v is not None})

    def save(self, path: epath.PathLike, dtype: str = "float32") -> None:
        """Writes the folder, its arrays in `dtype`; each file appears whole or not at all."""
        folder = epath.Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": FORMAT,
            "model": dict(self.model),
            "spec": json.loads(self.spec.to_json()),
            "encoder": stored_encoder.keep(self.encoder, folder),
            "facts": dict(self.facts),
        }
        flat = traverse_util.flatten_dict(dict(self.params), sep="/")
        constants = traverse_util.flatten_dict({"constants": dict(self.constants)}, sep="/")
        flat |= {name: np.asarray(value) for name, value in constants.items()}
        arrays = {k: np.ascontiguousarray(jax.device_get(v)) for k, v in flat.items()}
        arrays = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in arrays.items()}
        storage.replaced(folder / "model.safetensors", save_safetensors(arrays))
        storage.replaced(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())

    @classmethod
    def restore(
        cls,
        path: epath.PathLike,
        encoder: condition_encoders.ImageEncoder | epath.PathLike | None = None,
    ) -> "Hypernetwork":
        """Reads what `save` wrote; `path` may be the folder, the workdir of `hyperlora train`,
        or "avatar-hypernetwork", the one that ships with the package.

        Args:
            encoder: the condition encoder or its path; needed when it is not kept with the
                checkpoint and no longer where it was (`stored_encoder.find`).

        Raises:
            UserError: no such folder, not a hypernetwork, damaged files, no or another encoder.
        """
        stored = read_stored(path)
        image_encoder = stored_encoder.find(stored.folder, stored.config["encoder"], encoder)
        generator = build_generator(stored.spec, stored.config["model"])
        facts, model = stored.config["facts"], stored.config["model"]
        return cls(generator, stored.params, image_encoder, facts, model, stored.constants)


class Stored(NamedTuple):
    """A checkpoint as it lies on the disk, without its encoder.

    Attributes:
        folder: where it is.
        config: what config.json holds.
        spec: the sites that its LoRAs adapt.
        params: trained parameters.
        constants: arrays that nobody trains.
    """

    folder: epath.Path
    config: Json
    spec: LoraSpec
    params: Params
    constants: Params


def read_stored(path: epath.PathLike) -> Stored:
    """What `Hypernetwork.save` wrote; `path` may be the folder or the workdir.

    Raises:
        UserError: no such folder, not a hypernetwork, damaged files.
    """
    folder = _find(epath.Path(checkpoint_path(path)))
    try:
        config = json.loads((folder / "config.json").read_text())
        arrays = load_safetensors((folder / "model.safetensors").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: cannot be read ({error})") from error
    except Exception as error:  # SafetensorError is no ValueError
        raise UserError(f"checkpoint {folder}/model.safetensors: damaged ({error})") from error
    format = config.get("format") if isinstance(config, dict) else None
    if format != FORMAT:
        raise UserError(
            f"checkpoint {folder}: config.json is of format {format!r}, expected {FORMAT!r}"
        )
    arrays = {k: np.float32(v) if v.dtype == np.float16 else v for k, v in arrays.items()}
    params = traverse_util.unflatten_dict(jax.device_put(arrays), sep="/")
    constants = params.pop("constants", {})
    spec = LoraSpec.from_json(json.dumps(config["spec"]))
    return Stored(folder, config, spec, params, constants)


@functools.partial(jax.jit, static_argnames=("generator", "num_samples", "draw"))
def _write(
    generator: Generator,
    params: Params,
    constants: Params,
    pooled: Array,
    tokens: Array,
    key: Array,
    num_samples: int,
    draw: Draw,
) -> Params:
    condition = repeated(merge_references(pooled, tokens), num_samples)
    return generator.sample(params, constants, condition, key, draw)


@functools.partial(jax.jit, static_argnames=("generator", "encoder_module", "num_samples", "draw"))
def _generate(
    generator: Generator,
    encoder_module: ConvEncoder,
    weights: tuple[Params, Params, Params],
    references: Array,
    key: Array,
    num_samples: int,
    draw: Draw,
) -> Params:
    """Pictures to LoRAs as one program: on a small model every dispatch between two counts.
    `weights`: the generator's parameters and constants, the encoder's parameters."""
    params, constants, encoder_params = weights
    pooled, tokens = _embed(encoder_module, encoder_params, references)
    return _write(generator, params, constants, pooled, tokens, key, num_samples, draw)


@functools.partial(jax.jit, static_argnames="module")
def _embed(module: ConvEncoder, params: Params, references: Array) -> tuple[Array, Array]:
    return _embedded(functools.partial(module.apply, {"params": params}), references)


def _embedded(encode: Callable[[Array], Any], references: Array) -> tuple[Array, Array]:
    """Pooled [l, k, e] and tokens [l, k, m, e] of pictures [l, k, h, w, 3]."""
    lead, encoded = references.shape[:2], encode(references.reshape(-1, *references.shape[2:]))
    # Foreign encoders answer in numpy, which jnp.reshape would leave as it is.
    pooled, tokens = map(jnp.asarray, encoded)
    return (
        pooled.reshape(*lead, *pooled.shape[1:]),
        tokens.reshape(*lead, *tokens.shape[1:]),
    )


def is_stored(folder: epath.Path) -> bool:
    """Whether a folder is one that `Hypernetwork.save` wrote, by the names of its files."""
    return (folder / "model.safetensors").exists() and (folder / "config.json").exists()


def _find(path: epath.Path) -> epath.Path:
    for folder in (path, path / FOLDER):
        if is_stored(folder):
            return folder
    state = "has none" if path.exists() else "does not exist"
    raise UserError(
        f"checkpoint {path}: {state}; expected a folder with config.json and model.safetensors, "
        "or the workdir of a finished `hyperlora train`"
    )
