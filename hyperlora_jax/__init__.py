"""hyperlora_jax: hypernetworks that write Stable Diffusion LoRAs in one pass, in JAX/Flax."""

__version__ = "0.1.0"
