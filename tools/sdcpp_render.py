"""Run by `sdcpp_client.py` inside stable-diffusion.cpp's environment: one image, as .ppm.

    python sdcpp_render.py MODEL OUT.ppm SIZE STEPS [LORA]   -> JSON {"log": [lines about LoRAs]}

Imports nothing of this project: it is a stranger that is given two files.
"""

import json
import sys

from cyllama import sd


def main():
    """One image."""
    model, out, size, steps, *loras = sys.argv[1:]
    lines = []
    sd.set_log_callback(lambda level, text: lines.append(text.strip()))
    params = sd.SDContextParams(model_path=model, n_threads=-1)
    params.lora_apply_mode = sd.LoraApplyMode.IMMEDIATELY
    task = sd.SDImageGenParams(prompt="a photo of a cat", width=int(size), height=int(size), seed=7)
    task.sample_params = sd.SDSampleParams(
        sample_method=sd.SampleMethod.EULER,
        scheduler=sd.Scheduler.DISCRETE,
        sample_steps=int(steps),
        cfg_scale=1.0,
    )
    task.set_loras([{"path": path, "multiplier": 1.0} for path in loras])
    image = sd.SDContext(params).generate_with_params(task)[0]
    image.save_ppm(out)
    kept = [line for line in lines if "lora" in line.lower()]
    print(json.dumps({"log": kept[-40:]}))


if __name__ == "__main__":
    main()
