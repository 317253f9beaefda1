"""JAX's persistent compilation cache: a second start of the same program compiles nothing."""

import jax

from hyperlora_jax import storage


def default_directory() -> str:
    """$HYPERLORA_CACHE/xla, or ~/.cache/hyperlora_jax/xla."""
    return str(storage.cache_folder() / "xla")


def enable(directory: str | None = None, min_compile_seconds: float = 0.0) -> str:
    """Keeps compiled programs in `directory` (local or gs://), on CPU too; returns the directory.

    A directory that cannot be written only costs the cache: JAX warns and compiles as usual.
    """
    directory = directory or default_directory()
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
