#!/usr/bin/env bash
# diffusers 0.42.1: DDIM with "linspace" spacing steps to other noise levels than those it tells the model.
#
# Expected: DDIMScheduler(timestep_spacing="linspace") goes from each of its timesteps to the next; a model that
#           knows the noise exactly ends at the picture, as it does with "leading", and with Euler's "linspace".
# Seen:     the timesteps lie 999 / (n - 1) apart, the step always goes 1000 // n down. With 4 steps the model is told
#           666 and handed a picture of level 749. The differences add up: a picture of 0.5 comes out as 0.75 (0.58
#           with 10 steps, 0.53 with 20). PNDM is off in the same way.
# Matters:  "linspace" is what Euler, DPM++ and UniPC take by default, and DDIMScheduler.from_config takes it over
#           from a config that names it. Pictures of few steps are tinted and noisy, and nothing says why. Set
#           timestep_spacing="trailing" or "leading".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$folder/venv/bin/pip" install torch==2.13.0
"$folder/venv/bin/pip" install diffusers==0.42.1 transformers==5.23.0
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

PICTURE, NOISE = torch.full((1, 1, 1, 1), 0.5), torch.ones(1, 1, 1, 1)
config = EulerDiscreteScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="linspace"
).config


def ends_at(scheduler, count):
    """What is left of PICTURE when the model names NOISE, which is right, at every step."""
    scheduler.set_timesteps(count)
    alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[0])]
    if isinstance(scheduler, EulerDiscreteScheduler):
        latents = PICTURE + scheduler.sigmas[0] * NOISE
    else:
        latents = alpha.sqrt() * PICTURE + (1 - alpha).sqrt() * NOISE
    for step in scheduler.timesteps:
        scheduler.scale_model_input(latents, step)
        latents = scheduler.step(NOISE, step, latents).prev_sample
    return round(float(latents), 3)


def ddim(spacing):
    return DDIMScheduler.from_config(config, timestep_spacing=spacing, clip_sample=False)


counts = (4, 10, 20, 50)
found = {f"DDIM, {spacing}": [ends_at(ddim(spacing), count) for count in counts]
         for spacing in ("linspace", "leading", "trailing")}
found["Euler, linspace"] = [ends_at(EulerDiscreteScheduler.from_config(config), count) for count in counts]
carried = DDIMScheduler.from_config(config).config.timestep_spacing
for case, values in found.items():
    print(f"{case}: {values} after {counts} steps (right: 0.5)")
print("DDIM from Euler's config has", carried)
assert carried == "linspace"
for case in ("DDIM, leading", "DDIM, trailing", "Euler, linspace"):
    assert all(abs(value - 0.5) < 0.002 for value in found[case]), case
assert found["DDIM, linspace"][0] > 0.7 and found["DDIM, linspace"][1] > 0.55
assert found["DDIM, linspace"][2] > 0.52
PY
