"""Reading and writing LoRA files of every common tool; the names live here and nowhere else."""

from hyperlora_jax.lora_files.reading import load_lora, read_metadata
from hyperlora_jax.lora_files.writing import save_lora, save_loras

__all__ = ["load_lora", "read_metadata", "save_lora", "save_loras"]
