"""What `--help` of a command shows below its options: an example, and its commonest keys."""

_CONFIG = """Any value of a config: --config.section.key=value; the workdir remembers it.
All of them, with what they mean: hyperlora {command} --config FILE --print_config"""

_TRAIN = """example:
  hyperlora train --config my_pictures --workdir runs/me \\
      --config.data.source=PICTURES --config.base=BASE

commonest keys:
  --config.data.source=DIR              a folder of pictures per subject
  --config.base=BASE                    Stable Diffusion folder, .safetensors file or hub id
  --config.model.encoder=PATH           condition encoder: a CLIP folder, an .onnx file
  --config.data.num_identities=N        train on the first N subjects, hold the others out
  --config.train.num_steps=N
  --config.train.batch_size=N           subjects a step, over all devices
  --config.train.optimizer.learning_rate=X
  --config.train.dtype=bfloat16         arithmetic of the frozen base
  --config.train.remat=full             less memory, more time
  --config.model.rank=N --config.model.preset=attn-qkvo     what a LoRA is"""

_DISTILL = """example:
  hyperlora distill --config my_pictures --workdir runs/me \\
      --config.data.source=PICTURES --config.base=BASE

commonest keys:
  --config.data.source=DIR              a folder of pictures per subject
  --config.base=BASE                    Stable Diffusion folder, .safetensors file or hub id
  --config.distill.num_concepts=N       how many LoRAs
  --config.distill.num_steps=N          steps of each
  --config.distill.num_slots=N          LoRAs at a time
  --config.distill.recipe.learning_rate=X
  --config.distill.rank=N --config.distill.preset=w2w       default: as the model's
  --config.distill.prompt=TEXT          for all pictures; default: their captions"""

_EVALUATE = """example:
  hyperlora evaluate --workdir runs/me

commonest keys:
  --config.evaluate.judges.independent=PATH     who compares pictures: a CLIP folder, an .onnx file
  --config.evaluate.methods="('base','generated','conventional')"
  --config.evaluate.num_identities=N --config.evaluate.num_validation=N
  --config.evaluate.strengths="(1.0,1.5)"       to choose from
  --config.evaluate.prompts="('a photo',)"      default: the pictures' captions
  --config.evaluate.num_sampling_steps=N"""

_PRETRAIN = """example:
  hyperlora pretrain --config finetune_unet --workdir runs/unet \\
      --config.base=BASE --config.data.source=PICTURES

commonest keys:
  --config.data.source=DIR              a folder of pictures per subject (task unet)
  --config.train.num_steps=N --config.train.batch_size=N
  --config.train.optimizer.learning_rate=X
  --config.export.path=DIR              default: a folder of the workdir"""

_EXAMPLES = {
    "demo": "hyperlora demo --workdir demo",
    "import": "hyperlora import loras/ --base BASE --out runs/targets",
    "generate": "hyperlora generate --checkpoint runs/me --reference anna.jpg --out a.safetensors",
    "directions": "hyperlora directions runs/me/targets --labels labels.json --out d.safetensors",
    "refine": "hyperlora refine anna.safetensors --images pictures/anna --out refined.safetensors",
    "sample": 'hyperlora sample BASE --prompt "a portrait" --lora anna.safetensors --out pictures',
    "convert": "hyperlora convert anna.safetensors --format kohya --out anna.kohya.safetensors",
    "merge": "hyperlora merge a.safetensors=0.7 b.safetensors=0.5 --out both.safetensors",
    "push": "hyperlora push loras/ OWNER/NAME --upload",
    "extract": "hyperlora extract BASE TUNED --rank 16 --out difference.safetensors",
    "export": "hyperlora export runs/me --out hypernetwork --format pytorch",
    "inspect": "hyperlora inspect anna.safetensors",
    "serve": "hyperlora serve demo",
    "compile": "hyperlora compile --config sd15 --topology v5e-256",
}


def below_options(command: str) -> str:
    """The text for one command; "" for one without."""
    texts = {"train": _TRAIN, "distill": _DISTILL, "evaluate": _EVALUATE, "pretrain": _PRETRAIN}
    if command in texts:
        return f"{texts[command]}\n\n{_CONFIG.format(command=command)}"
    example = f"example:\n  {_EXAMPLES[command]}" if command in _EXAMPLES else ""
    if command in ("demo", "compile"):
        return f"{example}\n\n{_CONFIG.format(command=command)}"
    return example
