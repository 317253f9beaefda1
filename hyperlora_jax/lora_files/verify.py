"""Proof by the consumer: loads a LoRA file with PyTorch diffusers and compares with ours.

The file goes through the pipeline's own `load_lora_weights`. Compared are every site's delta and
the outputs of the UNet and the text encoders: adapter against merged weights, and against the
base, from which it must differ. PyTorch is imported here only, when a function is called.
"""
# pyright: reportPrivateImportUsage=false
# (diffusers exports its classes when they are asked for, which a type checker cannot see)

import contextlib
import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError
from hyperlora_jax.lora.sites import LoraSite, LoraSpec, site_factors
from hyperlora_jax.lora_files.compatibility import scale_notes
from hyperlora_jax.lora_files.peft_directory import (
    VECTOR_NAME,
    W2W_ADAPTER,
    adapter_folders,
    weights_of,
)
from hyperlora_jax.lora_files.reading import load_lora, read_tensors
from hyperlora_jax.lora_files.writing import DIFFUSERS_NAME
from hyperlora_jax.shipped import base_path

ADAPTER = "hyperlora_verify"
ADAPTERS = (ADAPTER, W2W_ADAPTER)
Modules = Mapping[str, Any]  # PyTorch models by component, not imported for their type
_NO_KEYS = re.compile(r"^No LoRA keys associated to \w+ found")


@dataclasses.dataclass(frozen=True)
class VerifyResult:
    """What PyTorch made of a file. All differences are absolute maxima.

    `max_abs_diff`: outputs with the adapter against merged weights; `max_delta_error`: any site's
    delta against ours, at `worst_site`; `delta_size`: the largest entry of ours; `output_change`:
    outputs with the adapter against the base's.
    """

    max_abs_diff: float
    max_delta_error: float
    worst_site: str
    delta_size: float
    output_change: float
    num_sites: int
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when everything loaded without a word and equals the merged weights."""
        exact = self.max_abs_diff <= 1e-5 and self.max_delta_error <= 1e-6
        silent = not (self.missing_keys or self.unexpected_keys or self.warnings)
        return exact and silent and self.output_change > 0


def load_modules(base: str | os.PathLike[str]) -> Modules:
    """{"unet", "text_encoder", …}: float32 PyTorch modules of a diffusers directory."""
    _torch()
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(base_path(str(base)))
    if not (folder / "unet" / "config.json").exists():
        raise UserError(f"{folder}: no unet/config.json, expected a diffusers model directory")
    with _quiet():
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        modules: dict[str, Any] = {"unet": unet}
        for name, kind in (
            ("text_encoder", CLIPTextModel),
            ("text_encoder_2", CLIPTextModelWithProjection),
        ):
            if (folder / name / "config.json").exists():
                modules[name] = kind.from_pretrained(folder / name)
    return {name: module.float().eval() for name, module in modules.items()}


def verify(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | Modules,
    lora: Params | None = None,
    spec: LoraSpec | None = None,
) -> VerifyResult:
    """Loads the file into PyTorch modules of the base and compares.

    `base` is a diffusers directory or `load_modules`' result; `lora` and `spec` are what the file
    must mean (default: what `load_lora` reads from it). The modules are left as they were.
    """
    torch = _torch()
    modules = dict(base) if isinstance(base, Mapping) else load_modules(base)
    if lora is None or spec is None:
        lora, spec = load_lora(path)
    with torch.no_grad(), _heard() as heard:
        plain = _outputs(modules)
        with _adapted(modules, Path(path)):
            loaded = _loaded_deltas(modules)
            adapted = _outputs(modules)
        expected = {site.path: _delta(lora, site) for site in spec.sites}
        with _merged(modules, expected) as absent:
            merged = _outputs(modules)
    # A LoRA of the UNet alone makes diffusers remark that the text encoders got nothing.
    bare = [f"prefix='{name}'" for name in modules if not spec.component(name).sites]
    remarks = [text for text in heard if not _NO_KEYS.search(text) or
               not any(prefix in text for prefix in bare)]  # fmt: skip
    missing = sorted((set(expected) - set(loaded)) | set(absent))
    errors = {
        name: float(np.abs(loaded[name] - expected[name].reshape(loaded[name].shape)).max())
        if loaded[name].size == expected[name].size
        else float("inf")
        for name in sorted(set(loaded) & set(expected))
    }
    return VerifyResult(
        max_abs_diff=_distance(adapted, merged),
        max_delta_error=max(errors.values(), default=float("inf")),
        worst_site=max(errors, key=lambda name: errors[name], default=""),
        delta_size=max(float(np.abs(delta).max()) for delta in expected.values()),
        output_change=_distance(adapted, plain),
        num_sites=len(loaded),
        missing_keys=tuple(missing),
        unexpected_keys=tuple(sorted(set(loaded) - set(expected))),
        warnings=tuple(remarks),
    )


def verify_source(path: str | os.PathLike[str], base: Modules, lora: Params, spec: LoraSpec) -> str:
    """What the library that a file is for (PEFT for adapter folders, else diffusers) makes of it,
    beside our reading, in one line.

    `base` is `load_modules`' result. Raises UserError where both read it differently, unless the
    file's alphas are such that diffusers is known to misread them.
    """
    library = "PEFT" if Path(path).is_dir() and adapter_folders(Path(path)) else "diffusers"
    try:
        verified = verify(path, base, lora, spec)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return f"{path}: could not be compared with {library}: {reason}"
    if verified.num_sites == 0:
        return f"{path}: could not be compared with {library}, which finds no layer in it"
    if verified.max_delta_error > 1e-4 * verified.delta_size:
        line = (
            f"{path}: {library} reads it differently: layer {verified.worst_site} differs by "
            f"{verified.max_delta_error:.1e}, its largest entry here is {verified.delta_size:.1e}"
        )
        if notes := scale_notes(*read_tensors(Path(path))):
            return f"{line} ({notes[0]})"
        raise UserError(line)
    count = f"{verified.num_sites - len(verified.unexpected_keys)} of {len(spec)} layers"
    return f"{path}: {library} reads the same ({count})"


def _torch() -> ModuleType:
    try:
        import peft  # noqa: F401
        import torch
    except ImportError as error:
        raise UserError(
            f"verification needs PyTorch and peft ({error.name} is missing): "
            'pip install "hyperlora-jax[torch]"'
        ) from error
    return torch


def pipeline_of(modules: Modules, is_xl: bool) -> Any:
    """PyTorch diffusers' pipeline of the modules and tokenizers that there are."""
    import diffusers

    names = ["unet", "vae", "text_encoder", "tokenizer"]
    names += ["text_encoder_2", "tokenizer_2"] if is_xl else ["safety_checker", "feature_extractor"]
    parts: dict[str, Any] = {name: modules.get(name) for name in names}
    parts["scheduler"] = diffusers.DDIMScheduler()
    with _quiet():
        if is_xl:
            return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


@contextlib.contextmanager
def _adapted(modules: Modules, path: Path) -> Iterator[None]:
    """The modules with the file's adapter in them, put there by PyTorch's own loaders."""
    folders = adapter_folders(path) if path.is_dir() else {}
    loaded, pipeline = [], None
    try:
        if folders:
            from peft import PeftModel

            name = W2W_ADAPTER if (path / VECTOR_NAME).exists() else ADAPTER
            for component, folder in folders.items():
                model = modules[component or "unet"]
                loaded.append(PeftModel.from_pretrained(model, str(folder), adapter_name=name))
        else:
            path = (weights_of(path, DIFFUSERS_NAME) or path) if path.is_dir() else path
            is_xl = modules["unet"].config.addition_embed_type == "text_time"
            pipeline = pipeline_of(modules, is_xl)
            pipeline.load_lora_weights(
                str(path.parent.resolve()), weight_name=path.name, adapter_name=ADAPTER
            )
        yield
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"{path}: PyTorch refuses it: {lines[0] if lines else error!r}") from error
    finally:
        for model in loaded:
            model.unload()
        if pipeline is not None:
            pipeline.unload_lora_weights()


def _canonical(component: str, name: str) -> str:
    """Site path of a PyTorch module name (transformers 5 has no "text_model." inside)."""
    name = name.replace(".base_layer", "")
    if component == "unet":
        return name
    prefix = "" if name.startswith("text_model.") or name == "text_projection" else "text_model."
    return f"{component}.{prefix}{name}"


def _loaded_deltas(modules: Modules) -> dict[str, np.ndarray]:
    """{site path: delta in PyTorch layout} of every adapter that the modules carry."""
    deltas = {}
    for component, model in modules.items():
        for name, module in model.named_modules():
            adapter = next((n for n in ADAPTERS if n in getattr(module, "lora_A", {})), None)
            if adapter is None:
                continue
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            product = (b.double().flatten(1) @ a.double().flatten(1)) * module.scaling[adapter]
            deltas[_canonical(component, name)] = product.numpy().reshape(b.shape[0], *a.shape[1:])
    return deltas


def _delta(lora: Params, site: LoraSite) -> np.ndarray:
    """A site's delta in PyTorch layout, float64."""
    pair = site_factors(lora, site)
    down = np.asarray(pair["down"], np.float64).reshape(site.fan_in, site.rank)
    product = down @ np.asarray(pair["up"], np.float64)
    if site.kind == "linear":
        return product.T
    window = product.reshape(*site.kernel_size, site.in_features, site.out_features)
    return window.transpose(3, 2, 0, 1)


@contextlib.contextmanager
def _merged(modules: Modules, deltas: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
    """The modules with the deltas added, for the time of the block; yields what has no layer."""
    import torch

    layers = {
        _canonical(component, name): module
        for component, model in modules.items()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    usable = {name for name in deltas if name in layers and
              layers[name].weight.numel() == deltas[name].size}  # fmt: skip
    originals = {name: layers[name].weight.clone() for name in usable}
    try:
        for name in usable:
            weight = layers[name].weight
            weight += torch.from_numpy(deltas[name]).to(weight.dtype).reshape(weight.shape)
        yield sorted(set(deltas) - usable)
    finally:
        for name, weight in originals.items():
            layers[name].weight.copy_(weight)


def _outputs(modules: Modules) -> list[np.ndarray]:
    """One forward pass of every module on fixed noise."""
    import torch

    random = torch.Generator().manual_seed(0)
    unet = modules["unet"]
    config = unet.config
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    latents = torch.randn(1, config.in_channels, 16, 16, generator=random)
    states = torch.randn(1, 7, width, generator=random)
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(1, pooled, generator=random),
                 "time_ids": torch.full((1, 6), 64.0)}  # fmt: skip
    step = torch.tensor([500])
    results = [unet(latents, step, states, added_cond_kwargs=added, return_dict=False)[0]]
    for name in sorted(set(modules) - {"unet"}):
        size = modules[name].config.vocab_size
        ids = torch.randint(0, size, (1, 8), generator=random)
        results.append(modules[name](ids, return_dict=False)[0])
    return [result.numpy() for result in results]


def _distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects every warning of diffusers and peft, logged or raised, instead of showing it."""
    heard: list[str] = []

    class _Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    collector = _Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    settings = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    with warnings.catch_warnings(record=True) as caught, _quiet(("transformers",)):
        warnings.simplefilter("always")
        for logger in loggers:
            logger.handlers, logger.propagate = [collector], False
        try:
            yield heard
        finally:
            for logger, handlers, propagate in settings:
                logger.handlers, logger.propagate = handlers, propagate
    ignored = (DeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)
    heard += [str(w.message) for w in caught if not issubclass(w.category, ignored)]


@contextlib.contextmanager
def _quiet(names: tuple[str, ...] = ("diffusers", "transformers")) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
