"""What a LoRA is: sites, factors, gauges, vectors, losses. No models, no files, no training."""

from hyperlora_jax.lora.sites import LoraSite, LoraSpec, module_path, spec_from_shapes, validate

__all__ = ["LoraSite", "LoraSpec", "module_path", "spec_from_shapes", "validate"]
