"""How XLA uses a CPU: one JAX device per core, and small products without a detour.

XLA:CPU leaves most of a second core idle when a program is made of small operations. As one device
per core, data-parallel work keeps all of them busy. Its compiler hands products to YNNPACK, whose
cost of a call is that of a whole product in a model as small as the embedded one.
"""

import os
from collections.abc import Mapping, MutableMapping

import jax

from hyperlora_jax.parallel.environment import settings

YNN = "--xla_cpu_experimental_ynn_fusion_type"
KNOWN_TO = (0, 10)  # versions of jaxlib; one that does not know a flag ends the program
MOST = 8  # batches divide by 8; more devices would ask for other batch sizes


def prepare() -> None:
    """Both, for a program of this project; call it before anything asks for devices.

    In a program that has started JAX before, nothing changes: flags would only reach its children.
    """
    if one_per_core() is not None:
        small_products(os.environ)


def small_products(environment: MutableMapping[str, str]) -> bool:
    """Leaves only convolutions to YNNPACK, by XLA_FLAGS, unless they speak of it already or
    this is another jaxlib than was measured; returns whether it did."""
    flags = environment.get("XLA_FLAGS", "")
    if YNN in flags or jax.__version_info__[:2] != KNOWN_TO:
        return False
    environment["XLA_FLAGS"] = f"{flags} {YNN}=LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION".strip()
    return True


def one_per_core(environment: Mapping[str, str] | None = None) -> int | None:
    """Makes JAX show the usable cores as devices, a power of two up to `MOST`.

    Call it before anything asks for devices. It leaves the number alone (None) off the CPU, when
    the environment already says how many, when several processes share the machine, and when JAX
    has started before.
    """
    environment = os.environ if environment is None else environment
    asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    platform = asked or environment.get("JAX_PLATFORMS", "")
    flags = environment.get("XLA_FLAGS", "")
    chosen = "JAX_NUM_CPU_DEVICES" in environment or "host_platform_device_count" in flags
    if platform != "cpu" or chosen or settings(environment) is not None:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = 1 << (min(cores or 1, MOST).bit_length() - 1)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # a program that embeds this one has started JAX: its devices stay
        return None
    return count
