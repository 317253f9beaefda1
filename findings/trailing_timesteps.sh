#!/usr/bin/env bash
# diffusers 0.42.1: "trailing" spacing gives one timestep too many, the last one -1, for 62 step counts.
#
# Expected: set_timesteps(n) gives n timesteps, all >= 0, for every n in 1...1000 (1000 training steps).
# Seen:     for 62 counts (61, 103, 121, 122, ...) n + 1 timesteps come back and the last is -1. Alphas are
#           then read at index -1, those of the *noisiest* step, where the sampler should be at the picture.
#           The step is a float that is rounded after an arange; the rounding of 1000 / n makes the extra one.
# Matters:  SDXL-Turbo, LCM, Lightning and zero-SNR fine-tunes say "trailing" in their scheduler_config.json;
#           a user who asks for 61 steps gets another number of steps and a spoilt picture, without a word.
#           Whoever copies the formula copies the fault.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
from diffusers import (
    DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler,
)

kinds = (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
for kind in kinds:
    wrong = []
    for count in range(1, 1001):
        scheduler = kind(num_train_timesteps=1000, timestep_spacing="trailing")
        scheduler.set_timesteps(count)
        steps = scheduler.timesteps.tolist()
        if len(steps) != count or min(steps) < 0:
            wrong.append((count, len(steps), min(steps)))
    print(kind.__name__, len(wrong), "of 1000 counts; (asked, given, smallest):", wrong[:4])
    assert len(wrong) == 62 and wrong[0][:2] == (61, 62) and all(low == -1 for *_, low in wrong)
PY
