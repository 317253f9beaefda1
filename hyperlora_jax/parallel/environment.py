"""What the environment says of the processes of a run; read without JAX."""

from collections.abc import Mapping
from typing import Any

from hyperlora_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SWITCH = "HYPERLORA_DISTRIBUTED"  # 1: always start, 0: never, unset: as the environment says


def settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` for this environment; None: a single process.

    Three variables say everything (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or
    none does and JAX detects SLURM, GKE and TPU pods itself.

    Raises:
      UserError: some of the three are missing or no numbers.
    """
    given = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    if environment.get(SWITCH) == "0":
        return None
    if len(given) == 3:
        try:
            count, index = int(environment[COUNT]), int(environment[INDEX])
        except ValueError as error:
            raise UserError(f"{COUNT}, {INDEX}: expected integers ({error})") from error
        if not 0 <= index < count:
            raise UserError(f"{INDEX}={index}: expected 0..{count - 1} ({COUNT}={count})")
        return {
            "coordinator_address": environment[ADDRESS],
            "num_processes": count,
            "process_id": index,
        }
    if COUNT in given or INDEX in given:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
        raise UserError(f"{' and '.join(given)} given, but not {' and '.join(missing)}")
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    slices = int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1
    slurm = "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    return {} if environment.get(SWITCH) == "1" or pod or slices or slurm else None
