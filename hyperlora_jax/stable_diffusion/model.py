"""A Stable Diffusion base model: modules, frozen parameters, noise schedule, tokenizer.

The functions that touch the device are module-level jitted functions of arrays with the modules as
static arguments, so that two models of one config share the compiled program.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperlora_jax.array_types import AnyArray, Array, Float, Int, Params, PRNGKey
from hyperlora_jax.diffusion.schedule import NoiseSchedule
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSpec, component_tree, spec_from_shapes
from hyperlora_jax.stable_diffusion import directory, inference
from hyperlora_jax.stable_diffusion.autoencoder import AutoencoderKL, vae_from_config
from hyperlora_jax.stable_diffusion.checkpoint import param_shapes, torch_to_flax
from hyperlora_jax.stable_diffusion.clip_text import ClipTextModel, text_model_from_config
from hyperlora_jax.stable_diffusion.lora_argument import check_lora
from hyperlora_jax.stable_diffusion.unet import UNet, unet_from_config

_CONSTRUCTORS = {
    "unet": unet_from_config,
    "vae": vae_from_config,
    "text_encoder": text_model_from_config,
    "text_encoder_2": text_model_from_config,
}


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """Modules and frozen parameters. A component that is None is an error only when it is used."""

    unet: UNet
    params: dict[str, Params]
    schedule: NoiseSchedule
    vae: AutoencoderKL | None = None
    text_encoder: ClipTextModel | None = None
    text_encoder_2: ClipTextModel | None = None
    tokenizers: tuple[Any, ...] = ()  # given ones; else read from `path` at first use
    path: Path | None = None

    @staticmethod
    def from_pretrained(
        path: str | Path, dtype: Any = jnp.float32, variant: str | None = None
    ) -> "StableDiffusion":
        """Reads a diffusers directory; parameters and arithmetic in `dtype`.

        Raises UserError naming the file for anything missing, unknown or unsupported in it.
        """
        root = Path(path)
        if not root.is_dir():
            raise UserError(f"{path}: not a directory, expected a diffusers model directory")
        modules: dict[str, Any] = {}
        params: dict[str, Params] = {}
        for name, construct in _CONSTRUCTORS.items():
            folder = root / name
            if not folder.is_dir():
                continue
            config = directory.read_json(folder / "config.json")
            try:
                module = construct(config, dtype)
            except UserError as error:
                raise UserError(f"{folder / 'config.json'}: {error}") from error
            files = directory.weight_files(folder, name, variant)
            modules[name] = module
            params[name] = torch_to_flax(
                directory.read_tensors(files),
                param_shapes(module),
                name,
                str(files[0]),
                lambda _, array: jnp.asarray(array, dtype),
            )
        if "unet" not in modules:
            raise UserError(f"{root / 'unet'}: folder not found, expected the UNet of the model")
        schedule_file = root / "scheduler" / "scheduler_config.json"
        schedule = NoiseSchedule.from_config(directory.read_json(schedule_file))
        return StableDiffusion(**modules, params=params, schedule=schedule, path=root)

    def save_pretrained(self, path: str | Path, dtype: str = "float16") -> None:
        """Writes a directory that PyTorch diffusers' StableDiffusionPipeline loads."""
        root = Path(path)
        index: dict[str, Any] = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.33.0",
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
        }
        classes = {
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
        }
        for name, component_class in classes.items():
            module = getattr(self, name)
            if module is not None:
                directory.write_component(
                    root / name, name, module.config, self.params[name], dtype
                )
                index[name] = component_class
        directory.write_json(root / "scheduler/scheduler_config.json", self.schedule.to_config())
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
        if self.text_encoder is not None:
            self.tokenizer.save_pretrained(str(root / "tokenizer"))
            index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        directory.write_json(root / "model_index.json", index)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """transformers' CLIPTokenizer, read when first used."""
        if self.tokenizers:
            return self.tokenizers[0]
        folder = (self.path or Path()) / "tokenizer"
        if self.path is None or not folder.is_dir():
            raise UserError(f"{folder}: folder not found, expected the tokenizer of the model")
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(str(folder))

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, "b n"]:
        """Token ids, padded or cut to the tokenizer's model_max_length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="np",
        )
        return tokens["input_ids"].astype(np.int32)

    def encode_prompt(
        self, prompts: Sequence[str], lora: Params | None = None
    ) -> Float[Array, "b n e"]:
        """Text states of the prompts, as the UNet takes them."""
        encoder = self._component("text_encoder")
        lora = component_tree(lora, "text_encoder") if lora else None
        return inference.encode_tokens(
            encoder, self.params["text_encoder"], self.tokenize(prompts), lora or None
        )

    def encode_images(
        self, images: AnyArray, key: PRNGKey | None = None
    ) -> Float[Array, "b hh ww z"]:
        """Scaled latents of images [b, h, w, 3] in [0, 1]: a sample, or the mean without a key."""
        return inference.encode_images(
            self._component("vae"), self.params["vae"], jnp.asarray(images, jnp.float32), key
        )

    def decode_latents(self, latents: Float[AnyArray, "b hh ww z"]) -> Float[Array, "b h w 3"]:
        """Images in [0, 1] of scaled latents."""
        return inference.decode_latents(
            self._component("vae"), self.params["vae"], jnp.asarray(latents)
        )

    def sample(
        self,
        key: PRNGKey,
        prompts: Sequence[str],
        lora: Params | None = None,
        strength: float | AnyArray = 1.0,
        num_steps: int = 20,
        guidance: float = 1.0,
        negative_prompts: Sequence[str] | None = None,
        latents: Float[AnyArray, "b hh ww z"] | None = None,
        sampler: str = "ddim",
    ) -> Float[Array, "b h w 3"]:
        """Images in [0, 1], one per prompt.

        L LoRAs serve the b prompts: image k uses LoRA k // (b / L), times `strength` (a number, or
        one per LoRA). `latents` is the initial standard normal noise; without it, it is drawn from
        `key`. Negative prompts count where guidance differs from 1.
        """
        batch = len(prompts)
        if lora is not None:
            check_lora(component_tree(lora, "unet"), self.params["unet"], batch)
        if latents is None:
            c = self.unet.settings
            latents = jax.random.normal(key, (batch, *c.sample_size, c.in_channels))
        guided = guidance != 1.0
        if guided:
            negative = list(negative_prompts or [""] * batch)
            if len(negative) != batch:
                raise UserError(f"{len(negative)} negative prompts for {batch} prompts")
            # Pairs lie side by side, so that image k's two branches both use LoRA k // (b / L).
            prompts = [text for pair in zip(negative, prompts, strict=True) for text in pair]
        states = self.encode_prompt(prompts, lora)
        return inference.sample_images(
            self.unet,
            self._component("vae"),
            self.schedule,
            sampler,
            num_steps,
            guided,
            {"unet": self.params["unet"], "vae": self.params["vae"]},
            jnp.asarray(latents, jnp.float32),
            states,
            jnp.asarray(guidance, jnp.float32),
            component_tree(lora, "unet") if lora else None,
            jnp.asarray(strength, jnp.float32),
        )

    @functools.cached_property
    def base_hash(self) -> str:
        """sha256 (hex) of the UNet's tensors in name order, cached beside the model's files."""
        if self.path is None:
            return directory.hash_of_params(self.params["unet"])
        folder = self.path / "unet"
        files = directory.weight_files(folder, "unet")
        return directory.cached_hash(folder, files, lambda: directory.hash_of_files(files))

    def lora_spec(self, preset: str | Sequence[str] = "attn-qkvo", rank: int = 4) -> LoraSpec:
        """Spec of the UNet's layers that the preset names."""
        return spec_from_shapes(self.params["unet"], preset, rank)

    def replace_params(self, params: Mapping[str, Params]) -> "StableDiffusion":
        """The same model with other parameters for some components; no longer tied to its files."""
        tokenizers = self.tokenizers or ((self.tokenizer,) if self.text_encoder else ())
        return dataclasses.replace(
            self, params={**self.params, **params}, tokenizers=tokenizers, path=None
        )

    def _component(self, name: str) -> Any:
        module = getattr(self, name)
        if module is None:
            where = f"{self.path / name}: folder not found" if self.path else "not given"
            raise UserError(f"{where}, expected the {name} of the model")
        return module
