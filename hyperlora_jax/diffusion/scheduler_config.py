"""What a scheduler_config.json of diffusers says: read, harmless, worth a line, or refused.

Every key of the file is in one of the tables below; one that is in none and not empty is an error,
so that nothing which changes a schedule is skipped. Checked against the constructors of diffusers
0.42 (`tests/diffusion/test_scheduler_config.py` walks all of them).
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from hyperlora_jax.diffusion.schedule import SAMPLER_OF, NoiseSchedule
from hyperlora_jax.errors import UserError

log = logging.getLogger(__name__)

_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_SCALED = {**_SD_BETAS, "beta_schedule": "scaled_linear"}
# Classes with a discrete schedule of betas, and where their defaults are not NoiseSchedule's.
CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSDEScheduler": _SD_BETAS,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SD_BETAS,
    "KDPM2DiscreteScheduler": _SD_BETAS,
    "LCMScheduler": _SCALED,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "SASolverScheduler": {},
    "TCDScheduler": _SCALED,
    "UniPCMultistepScheduler": {},
}
# Key -> the only values that mean the schedule we know; other values describe other schedules.
REFUSED: dict[str, tuple[object, ...]] = {
    "timestep_type": ("discrete",),
    "predict_epsilon": (True,),  # of diffusers before 0.9; False was prediction_type "sample"
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "shift": (1.0,),
    "shift_terminal": (),
    "sigma_min": (),
    "sigma_max": (),
    "sigma_data": (),
    "sigma_schedule": (),
    "rho": (),
    "snr_shift_scale": (),
}
# Key -> values with which PyTorch draws what we draw; with others it draws something a little
# different, which is said. A second entry names the classes that the key concerns.
_DPM = ("DPMSolverMultistepScheduler",)
_PC = ("UniPCMultistepScheduler",)
NOT_HONOURED: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "clip_sample": ((False,), ()),
    "thresholding": ((False,), ()),
    "use_exponential_sigmas": ((False,), ()),
    "use_beta_sigmas": ((False,), ()),
    "use_lu_lambdas": ((False,), ()),
    "final_sigmas_type": (("zero",), ()),
    "interpolation_type": (("linear",), ()),
    "euler_at_final": ((False,), ()),
    "solver_order": ((2,), _DPM + _PC),
    "solver_type": (("midpoint", "bh2"), _DPM + _PC),  # PyTorch takes each class' own for the other
    "algorithm_type": (("dpmsolver++",), _DPM),
    "lower_order_final": ((True,), _DPM + _PC),
    "predict_x0": ((True,), _PC),
    "disable_corrector": (([],), _PC),
    "skip_prk_steps": ((True,), ("PNDMScheduler",)),
}
# Without effect by themselves (the range of a clipping that is off), or settings of a sampler that
# is not drawn with here: `SAMPLER_OF` has those that are.
HARMLESS = frozenset(
    {
        "clip_sample_range", "corrector_order", "dynamic_thresholding_ratio", "flow_shift",
        "lambda_min_clipped", "noise_sampler_seed", "predictor_order", "sample_max_value",
        "solver_p", "tau_func", "time_shift_type", "variance_type",
    }
)  # fmt: skip
HONOURED = tuple(f.name for f in dataclasses.fields(NoiseSchedule) if f.name != "sampler")


def read_scheduler_config(config: Mapping[str, object]) -> NoiseSchedule:
    """The noise schedule of a scheduler_config.json.

    Raises:
        UserError: a class or a value that means another kind of schedule (EDM, flow matching,
            continuous time), a key that is in no table, a value of the wrong type.
    """
    kind = config.get("_class_name")
    if kind is not None and not (isinstance(kind, str) and kind in CLASSES):
        raise UserError(
            f"scheduler {kind}: has no discrete schedule of betas, expected one of "
            f"{', '.join(CLASSES)}"
        )
    values = dict(CLASSES.get(kind or "", {}))
    values["sampler"] = SAMPLER_OF.get(kind or "", "ddim")
    if kind is not None and kind not in SAMPLER_OF:
        log.warning("scheduler: no sampler draws as %s does, pictures are drawn with ddim", kind)
    if kind == "PNDMScheduler":  # without the key it takes Runge-Kutta steps
        config = {"skip_prk_steps": False, **config}
    for key, value in config.items():
        if key.startswith("_") or value is None:
            continue
        if key in HONOURED:
            values[key] = _typed(key, value)
        elif key in REFUSED:
            if value not in REFUSED[key]:
                expected = " or ".join(map(repr, REFUSED[key])) or "none"
                raise UserError(
                    f"scheduler: {key} = {value!r} means another kind of noise schedule, "
                    f"expected {expected}"
                )
        elif key in NOT_HONOURED:
            same, classes = NOT_HONOURED[key]
            if value not in same and (not classes or kind in classes):
                log.warning(
                    "scheduler: %s = %r is not honoured, pictures are drawn as with %r",
                    key, value, same[0],
                )  # fmt: skip
        elif key not in HARMLESS and value not in (False, [], {}, ""):
            raise UserError(f"scheduler: key {key!r} (value {value!r}) is unknown")
    return NoiseSchedule(**values)


def _typed(key: str, value: object) -> object:
    """The value, when it is of the type that the field has."""
    if key == "trained_betas":
        if not isinstance(value, list | tuple) or not all(_is_number(x) for x in value):
            raise UserError(f"scheduler: {key} is {value!r:.60}, expected a list of numbers")
        return tuple(map(float, value))
    if key in ("num_train_timesteps", "steps_offset", "original_inference_steps"):
        good, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif key in ("beta_start", "beta_end", "timestep_scaling"):
        good, expected = _is_number(value), "a number"
    elif key in ("rescale_betas_zero_snr", "set_alpha_to_one", "use_karras_sigmas"):
        good, expected = isinstance(value, bool), "true or false"
    else:
        good, expected = isinstance(value, str), "a text"
    if not good:
        raise UserError(f"scheduler: {key} is {value!r:.60}, expected {expected}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
