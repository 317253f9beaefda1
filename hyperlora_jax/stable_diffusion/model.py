"""A Stable Diffusion base model: modules, frozen parameters, noise schedule, tokenizer.

The functions that touch the device are module-level jitted functions of arrays with the modules as
static arguments, so that two models of one config share the compiled program.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hyperlora_jax.array_types import AnyArray, Array, DType, Float, Int, Key, Params, PRNGKey
from hyperlora_jax.diffusion.samplers import SAMPLERS
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec, component_tree, spec_from_shapes
from hyperlora_jax.lora_files.base_files import read_json, weight_files
from hyperlora_jax.parallel.sharding import DEFAULT_RULES, Rule, split_rows
from hyperlora_jax.stable_diffusion import inference, prompt_embeddings
from hyperlora_jax.stable_diffusion.networks import convolutions
from hyperlora_jax.stable_diffusion.networks.autoencoder import AutoencoderKL
from hyperlora_jax.stable_diffusion.networks.clip_text import ClipTextModel
from hyperlora_jax.stable_diffusion.networks.lora_argument import (
    check_lora,
    count_loras,
    for_branches,
    lora_tree,
    scaled,
)
from hyperlora_jax.stable_diffusion.networks.unet import UNet
from hyperlora_jax.stable_diffusion.picture_regions import Region, lay_out
from hyperlora_jax.stable_diffusion.weights import directory, loading, single_file
from hyperlora_jax.stable_diffusion.weights.clip_tokenizer import (
    Tokenizer,
    load_tokenizer,
    most_tokens,
    token_ids,
)
from hyperlora_jax.stable_diffusion.weights.flax_trees import param_shapes
from hyperlora_jax.stable_diffusion.weights.parts import check_token_ids

log = logging.getLogger(__name__)

BRANCHES = ("both", "conditional")
NO_LENGTH = 10**9  # transformers gives 1e30 for a tokenizer that names no model_max_length


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """Modules and frozen parameters. A component that is None is an error only when it is used."""

    unet: UNet
    params: dict[str, Params]
    schedule: NoiseSchedule
    vae: AutoencoderKL | None = None
    text_encoder: ClipTextModel | None = None
    text_encoder_2: ClipTextModel | None = None
    tokenizers: tuple[Tokenizer, ...] = ()  # given ones; else read from `path` at first use
    path: Path | None = None
    default_guidance: float = loading.GUIDANCE  # of `sample`

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"StableDiffusion({'SDXL' if self.is_xl else 'SD'}, {', '.join(self.params)}: "
            f"{count:,} parameters, default_guidance={self.default_guidance:g}, path={self.path})"
        )

    @staticmethod
    def from_pretrained(
        path: str | Path,
        dtype: DType = jnp.float32,
        variant: str | None = None,
        mesh: Mesh | None = None,
        rules: Sequence[Rule] = DEFAULT_RULES,
        on_host: Collection[str] = (),
    ) -> "StableDiffusion":
        """Reads a diffusers directory, hub id or single file (`single_file.py`) for arithmetic in
        `dtype`.

        `variant` "fp16" reads `*.fp16.safetensors`; None takes full precision where it is there, or
        else the variant that is. With a mesh, parameters are spread over it by
        the sharding table `rules`; those of the components `on_host` ("vae", …) stay numpy arrays.
        Of the others one tensor at a time is in host memory.

        Raises UserError naming the file for anything missing, unknown or unsupported in it.
        """
        root = single_file.base_folder(path, variant)
        modules, params, schedule = loading.load_directory(
            root, dtype, variant, mesh, rules, on_host
        )
        modules["unet"] = modules["unet"].clone(mesh=mesh)
        return StableDiffusion(
            **modules,
            params=params,
            schedule=schedule,
            path=root,
            default_guidance=loading.load_guidance(root),
        )

    @staticmethod
    def outline(
        path: str | Path, names: Sequence[str] = ("unet", "text_encoder", "text_encoder_2")
    ) -> "StableDiffusion":
        """Some components of a base without their numbers: `params` are shapes, of all but the
        autoencoder. Enough for specs, for the base's hash and for checking LoRA files, in
        milliseconds and without memory.

        Raises UserError as `from_pretrained` does.
        """
        root = single_file.base_folder(path)
        loaded = loading.load_modules(root, jnp.float32, names)
        modules = {name: module for name, (module, _) in loaded.items()}
        shaped = {name: module for name, module in modules.items() if name != "vae"}
        params = {name: param_shapes(module) for name, module in shaped.items()}
        return StableDiffusion(**modules, params=params, schedule=NoiseSchedule(), path=root)

    def save_pretrained(self, path: str | Path, dtype: str = "float16") -> None:
        """Writes a directory that PyTorch diffusers' pipeline of the family loads."""
        names = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
        components = ("unet", "vae", "text_encoder", "text_encoder_2")
        loading.save_directory(
            Path(path),
            {name: getattr(self, name) for name in components if getattr(self, name) is not None},
            self.params,
            self.schedule,
            {n: getattr(self, n) for n, encoder in names.items() if getattr(self, encoder)},
            dtype,
            self.is_xl,
            self.default_guidance,
        )

    @property
    def is_xl(self) -> bool:
        """True for SDXL: the UNet's config decides, not the pipeline class."""
        return self.unet.settings.addition_time_width is not None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the first text encoder, read when first used; transformers'
        CLIPTokenizer once it is asked for more than token ids."""
        return self._tokenizer(0)

    @functools.cached_property
    def tokenizer_2(self) -> Tokenizer:
        """The same of SDXL's second text encoder."""
        return self._tokenizer(1)

    def _tokenizer(self, i: int) -> Tokenizer:
        if len(self.tokenizers) > i:
            return self.tokenizers[i]
        name = ("tokenizer", "tokenizer_2")[i]
        if self.path is None:
            raise UserError(f"{name}: folder not found, expected the tokenizer of the model")
        if (self.path / single_file.STAMP).is_file() and not (self.path / name).is_dir():
            single_file.family_tokenizer(self.path)
        return load_tokenizer(self.path / name)

    def tokenize(
        self, prompts: Sequence[str], tokenizer: Tokenizer | None = None, name: str = "text_encoder"
    ) -> Int[np.ndarray, "b n"]:
        """Token ids for the text encoder `name`, padded or cut to its window: the tokenizer's
        model_max_length, or the encoder's positions where the tokenizer names no length.

        Raises UserError for a tokenizer of another vocabulary or window than the text encoder.
        """
        if tokenizer is None:
            tokenizer = self.tokenizer
        encoder = getattr(self, name)
        window = tokenizer.model_max_length
        if encoder is not None:
            positions = encoder.values["max_position_embeddings"]
            if positions < window < NO_LENGTH:
                raise UserError(
                    f"tokenizer: model_max_length is {window}, the text encoder has {positions} "
                    "positions; they belong to different models"
                )
            window = min(window, positions)
        longest = most_tokens(tokenizer, prompts)
        if longest > window:
            log.warning("a prompt of %d tokens is cut to %d, start and end included",
                        longest, window)  # fmt: skip
        tokens = token_ids(tokenizer, prompts, window)
        if encoder is not None:
            check_token_ids(tokens, encoder.values["vocab_size"])
        return tokens

    def encode_prompt(
        self, prompts: Sequence[str], lora: Params | None = None
    ) -> Float[Array, "b n e"]:
        """Text states of the prompts, as the UNet takes them."""
        return self.embed_prompts(prompts, lora)["states"]

    def embed_prompts(
        self, prompts: Sequence[str], lora: Params | None = None, clip_skip: int = 0
    ) -> dict[str, Array]:
        """ "states" [b, n, e], and of SDXL "pooled" [b, p] (added_cond_kwargs["text_embeds"]).

        `lora` is a whole LoRA tree: only its text encoder sites count here. The states are taken
        `clip_skip` layers before the usual ones.
        """
        names = ("text_encoder", "text_encoder_2") if self.is_xl else ("text_encoder",)
        if self.is_xl and self.text_encoder is None:
            names = ("text_encoder_2",)
        self._check_clip_skip(names, clip_skip)
        tokenizers = [
            self.tokenizer if name == "text_encoder" else self.tokenizer_2 for name in names
        ]
        return inference.encode_tokens(
            tuple(self.component(name) for name in names),
            tuple(self.params[name] for name in names),
            tuple(
                self.tokenize(prompts, tokenizer, name)
                for name, tokenizer in zip(names, tokenizers, strict=True)
            ),
            tuple(component_tree(lora, name) if lora else None for name in names),
            self.is_xl,
            clip_skip,
        )

    def _check_clip_skip(self, names: Sequence[str], clip_skip: int) -> None:
        layers = min(self.component(name).values["num_hidden_layers"] for name in names)
        most = layers - 1 if self.is_xl else layers
        if not 0 <= clip_skip <= most:
            raise UserError(
                f"clip_skip is {clip_skip}, expected 0 to {most}: the text encoder has {layers} "
                "layers"
            )

    def _guided_embeddings(
        self,
        prompts: Sequence[str],
        negative: Sequence[str] | None,
        loras: tuple[Params | None, Params | None],
        clip_skip: int,
        axis: int,
    ) -> dict[str, Array]:
        """Rows of both branches as `inference.stacked` puts them; `loras` are of the negative and
        of the positive one.

        As in diffusers' pipelines, only positive prompts skip layers, and SDXL without negative
        prompts takes zeros for them.
        """
        positive = self.embed_prompts(prompts, loras[1], clip_skip)
        if negative is None and self.is_xl and self.zeros_for_no_prompt():
            other = jax.tree.map(jnp.zeros_like, positive)
        else:
            negative = [""] * len(prompts) if negative is None else list(negative)
            if len(negative) != len(prompts):
                raise UserError(f"{len(negative)} negative prompts for {len(prompts)} prompts")
            other = self.embed_prompts(negative, loras[0])
        return jax.tree.map(lambda n, p: inference.stacked(n, p, axis), other, positive)

    def zeros_for_no_prompt(self) -> bool:
        """Whether SDXL without a prompt takes zeros instead of the empty prompt's states."""
        index = self.path / "model_index.json" if self.path else None
        if index is None or not index.is_file():
            return True
        return read_json(index).get("force_zeros_for_empty_prompt", True)

    def encode_images(
        self, images: AnyArray, key: PRNGKey | None = None
    ) -> Float[Array, "b hh ww z"]:
        """Scaled latents of images [b, h, w, 3] in [0, 1]: a sample, or the mean without a key."""
        return inference.encode_images(
            self.component("vae"), self.params["vae"], jnp.asarray(images, jnp.float32), key
        )

    def decode_latents(self, latents: Float[AnyArray, "b hh ww z"]) -> Float[Array, "b h w 3"]:
        """Images in [0, 1] of scaled latents."""
        return inference.decode_latents(
            self.component("vae"), self.params["vae"], jnp.asarray(latents)
        )

    def sample(  # noqa: PLR0913
        self,
        key: PRNGKey | Key[Array, " b"] | int,
        prompts: str | Sequence[str],
        lora: object = None,
        strength: float | Sequence[float] | AnyArray = 1.0,
        num_steps: int = 20,
        guidance: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        latents: Float[AnyArray, "b hh ww z"] | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        clip_skip: int = 0,
        regions: Sequence[Region] = (),
        apart: bool = False,
        lora_branches: str = "both",
    ) -> Float[Array, "b h w 3"]:
        """Images in [0, 1], one per prompt; a single prompt is drawn once with every LoRA.

        L LoRAs serve the b prompts: image k uses LoRA k // (b / L), times `strength` (a number, or
        one per LoRA). A model on a mesh splits the pictures over it.

        Args:
            key: of the noise, or a seed; or one key per picture, with `latents`, of what the
                samplers euler_a, lcm and tcd add.
            lora: a tree, with a leading axis for several; a file; what `load_lora` returns; or a
                list of those.
            guidance: None means `default_guidance`.
            negative_prompts: one for all, or one each; needs a guidance other than 1.
            latents: the initial standard normal noise; without it, it is drawn from `key`.
            sampler: of `samplers.SAMPLERS`; None means the base's own (`schedule.sampler`).
            height, width: in pixels; None means what the model was trained at.
            clip_skip: layers of the text encoders that are left out at their end, as diffusers
                counts them (1 is what other programs call "clip skip 2").
            regions: parts of every picture with LoRAs and prompts of their own, in one pass of the
                UNet, instead of `lora`; what none covers has the picture's prompt and no LoRA.
            apart: keeps self-attention, group norms and convolutions within regions: people mix
                less, borders show more, convolutions are computed once for each region.
            lora_branches: of guidance, that LoRAs act on: "both", or "conditional" (the negative
                branch is the base's).

        Raises:
            UserError: a LoRA, a region, a sampler or a size that does not fit the model, negative
                prompts without guidance or of another number.
        """
        sampler = self.schedule.sampler if sampler is None else sampler
        if sampler not in SAMPLERS:
            raise UserError(f"sampler is {sampler!r}, expected one of {sorted(SAMPLERS)}")
        if lora_branches not in BRANCHES:
            raise UserError(f"lora_branches is {lora_branches!r}, expected one of {list(BRANCHES)}")
        if regions and lora is not None:
            raise UserError('found lora and regions, expected a region "all" for that LoRA')
        if apart and not regions:
            raise UserError("apart: found no regions, expected some to keep apart")
        lora = lora_tree(lora, self)
        lora = None if lora is None else scaled(lora, strength)
        prompts = [prompts] * count_loras(lora) if isinstance(prompts, str) else list(prompts)
        batch = len(prompts)
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * batch
        guidance = self.default_guidance if guidance is None else guidance
        if self.unet.settings.guidance_width and negative_prompts is not None:
            raise UserError(
                "negative prompts do nothing: this UNet was distilled with its guidance"
            )
        guided = guidance != 1.0 and not self.unet.settings.guidance_width
        if negative_prompts is not None and not guided:
            raise UserError("negative prompts do nothing at guidance 1; give another guidance")
        key = jax.random.key(key) if isinstance(key, int) else key
        noise = self.noise(key, batch, height, width) if latents is None else latents
        one_key = not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim == 0
        keys = jax.random.split(jax.random.fold_in(key, 1), batch) if one_key else key
        parts = None
        if regions:
            parts = lay_out(regions, self, prompts, noise.shape[1:3])
            prompts, lora, each = parts.prompts, parts.lora, len(parts.prompts) // batch
            if negative_prompts is not None and len(negative_prompts) == batch:
                negative_prompts = [text for text in negative_prompts for _ in range(each)]
        if lora is not None:
            check_lora(component_tree(lora, "unet"), self.params["unet"], len(prompts))
        beside = parts is None and lora_branches == "both"
        if guided:
            pair = lora if lora_branches == "both" else None, lora
            text = self._guided_embeddings(
                prompts, negative_prompts, pair, clip_skip, 1 if beside else 0
            )
            if lora is not None and not beside:
                lora = for_branches(lora, lora_branches == "both")
        else:
            text = self.embed_prompts(prompts, lora, clip_skip)
        factor, rows = self.component("vae").downsampling, 2 * batch if guided else batch
        size = noise.shape[1] * factor, noise.shape[2] * factor
        text |= prompt_embeddings.nothing_given(self, rows, size)
        if parts is not None:
            text["masks"] = jnp.tile(parts.masks, (rows // batch, 1, 1, 1))
        return inference.sample_images(
            self.unet.clone(apart=apart) if apart else self.unet,
            self.component("vae"),
            self.schedule,
            sampler,
            num_steps,
            ("beside" if beside else "apart") if guided else "",
            {"unet": self.frozen_unet, "vae": self.params["vae"]},
            split_rows(jnp.asarray(noise, jnp.float32), self.unet.mesh),
            text,
            jnp.asarray(guidance, jnp.float32),
            component_tree(lora, "unet") if lora else None,
            keys,
        )

    def noise(
        self, key: PRNGKey | int, num: int, height: int | None = None, width: int | None = None
    ) -> Float[Array, "b hh ww z"]:
        """Standard normal latents for `num` pictures of so many pixels; None: the model's own."""
        settings, factor = self.unet.settings, self.component("vae").downsampling
        size = []
        for name, pixels, own in zip(
            ("height", "width"), (height, width), settings.sample_size, strict=True
        ):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise UserError(f"{name} is {pixels}, expected a multiple of {factor} pixels")
            size.append(own if pixels is None else pixels // factor)
        key = jax.random.key(key) if isinstance(key, int) else key
        return jax.random.normal(key, (num, *size, settings.out_channels))

    @functools.cached_property
    def frozen_unet(self) -> Params:
        """The UNet's parameters for programs that do not train them: on CPUs, kernels of large
        convolutions `transformed` once, which adds half of the UNet's memory at SD 1.5's size."""
        return convolutions.frozen(self.params["unet"])

    @functools.cached_property
    def base_hash(self) -> str:
        """sha256 (hex) of the UNet's tensors in name order, kept in the cache folder."""
        if self.path is None:
            return directory.hash_of_params(self.params["unet"])
        folder = self.path / "unet"
        return directory.cached_hash(folder, weight_files(folder, "unet"))

    def lora_spec(self, preset: str | Sequence[str] = "attn-qkvo", rank: int = 4) -> LoraSpec:
        """Spec of the UNet's layers that the preset names."""
        return spec_from_shapes(self.params["unet"], preset, rank)

    def replace_params(self, params: Mapping[str, Params]) -> "StableDiffusion":
        """The same model with other parameters for some components; no longer tied to its files."""
        tokenizers = self.tokenizers
        if not tokenizers and self.text_encoder is not None:
            tokenizers = (self.tokenizer, self.tokenizer_2) if self.is_xl else (self.tokenizer,)
        return dataclasses.replace(
            self, params={**self.params, **params}, tokenizers=tokenizers, path=None
        )

    def component(self, name: str) -> Any:
        """A module by its name; UserError where the model has none."""
        module = getattr(self, name)
        if module is None:
            where = "not given" if self.path is None else single_file.place_of(self.path, name)
            raise UserError(f"{where}, expected the {name} of the model")
        return module
