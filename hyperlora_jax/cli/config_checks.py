"""A config is checked before any work: the command's sections, every value by
`config_rules.table`, and what only several of them together can get wrong."""

import difflib
import math
from pathlib import Path

from ml_collections import ConfigDict

from hyperlora_jax.cli.config import flatten
from hyperlora_jax.cli.config_rules import Rule, rule_of
from hyperlora_jax.errors import UserError

# Sections that a command reads, and a config that has them.
NEEDS = {
    "distill": (("base", "data", "distill"), "configs/avatars.py"),
    "train": (("base", "data", "model", "train", "generate", "mesh"), "configs/avatars.py"),
    "evaluate": (("base", "data", "distill", "model", "evaluate"), "configs/avatars.py"),
    "pretrain": (("task", "data", "train", "export", "mesh"), "configs/tiny_sd.py"),
    "compile": (("base", "train", "mesh"), "configs/sd15.py"),
    "demo": (("base", "data", "distill", "model", "train", "evaluate"), "configs/demo.py"),
}
BATCHES = ("train", "train.vae", "autoencoder")  # sections with a batch_size


WANTED = {
    "base": "a Stable Diffusion folder, .safetensors file or hub id",
    "data.source": "a folder with a sub-folder of pictures per subject",
    "model.encoder": "a CLIP folder, a transformers folder or an .onnx file",
}


def check(config: ConfigDict, command: str, source: object) -> None:
    """Checks a whole config for a command; `source` says where it came from.

    Raises:
        UserError: names the flag, what was found and what is expected.
    """
    check_command(config, command, source)
    for key, value in flatten(config).items():
        rule = rule_of(key)
        if rule and not rule.accepts(_asked(config, key, value)):
            raise UserError(_refusal(key, value, rule))
    if "objectives" in config.get("train", {}) and not any(config.train.objectives.values()):
        names = ", ".join(config.train.objectives)
        raise UserError(
            f"--config.train.objectives: all are 0, expected a weight for one of {names}"
        )
    if command in ("train", "pretrain") and config.train.get("trackers"):
        from hyperlora_jax.train.trackers import check_installed

        check_installed(config.train.trackers)
    if command in ("train", "distill", "evaluate"):
        for key, expected in WANTED.items():
            unused = key == "model.encoder" and command == "distill"
            if not (unused or flatten(config)[key]):
                raise UserError(f"--config.{key}: is empty, expected {expected}")
        _check_base(config.base)


def check_command(config: ConfigDict, command: str, source: object) -> None:
    """Whether this is a config of the command.

    Raises:
        UserError: it is another command's.
    """
    needed, example = NEEDS[command]
    missing = [name for name in needed if name not in config]
    if not missing and command != "pretrain" and not isinstance(config.base, str):
        missing = ["base model"]
    if missing:
        others = [name for name, (wants, _) in NEEDS.items() if all(w in config for w in wants)]
        kind = f" (found one of `hyperlora {others[0]}`)" if others else ""
        raise UserError(
            f"--config {source}: has no {missing[0]}, expected a config of `hyperlora {command}`"
            f"{kind}, e.g. {example}"
        )


def check_batches(config: ConfigDict, num_devices: int) -> None:
    """Whether the mesh can share out every batch.

    Raises:
        UserError: it cannot; names the nearest sizes that it can.
    """
    from hyperlora_jax.hypernet.baselines import BASELINES
    from hyperlora_jax.parallel.mesh import resolve_axes

    try:
        data, fsdp, _ = resolve_axes(num_devices, **config.mesh)
    except UserError as error:
        raise UserError(f"--config.{error}") from error
    values, parts = flatten(config), data * fsdp
    if values.get("train.batch_per_device") or values.get("model.generator") in BASELINES:
        return
    for section in BATCHES:
        size = values.get(f"{section}.batch_size")
        unused = section == "train.vae" and values.get("model.generator") != "latent_diffusion"
        if size is None or size % parts == 0 or unused:
            continue
        nearest = sorted({max(parts, size // parts * parts), math.ceil(size / parts) * parts})
        raise UserError(
            f"--config.{section}.batch_size={size}: expected a multiple of {parts}, the devices "
            f"that share a batch (data={data} x fsdp={fsdp}), e.g. {' or '.join(map(str, nearest))}"
        )


def _check_base(base: str) -> None:
    unet = Path(base) / "unet"
    if (unet / "config.json").is_file() and len(list(unet.iterdir())) == 1:
        raise UserError(
            f"--config.base={base}: holds no weights, only what `hyperlora compile` needs; name a "
            "model of this kind"
        )


def _asked(config: ConfigDict, key: str, value: object) -> object:
    """The value as the table knows it: methods may be the user's own too."""
    if key == "evaluate.methods" and isinstance(value, tuple):
        return tuple(name for name in value if name not in config.evaluate.others) or ("base",)
    return value


def _refusal(key: str, value: object, rule: Rule) -> str:
    close = difflib.get_close_matches(str(value), rule.choices, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"--config.{key}={value}: expected {rule.expected}{hint}"
