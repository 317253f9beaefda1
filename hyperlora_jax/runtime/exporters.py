"""PyTorch's exporters, without their remarks: what fails is one line, what runs is compared."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from hyperlora_jax import storage
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    import onnx
    import torch

TOLERANCE = 1e-5  # of the largest number, against PyTorch


@contextmanager
def exporting(what: str, *packages: str) -> Iterator[None]:
    """Whatever goes wrong inside is one line about `what`, which needs these packages.

    Raises:
        UserError: a package is not installed; an exporter, or what it was given, fails.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{what}: needs {package}, which is not installed; "
                "pip install 'hyperlora-jax[torch,onnx]'"
            )
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # torch's, onnx's and onnxruntime's share no base class
            first: BaseException = error
            while first.__cause__ is not None:  # what an exporter wraps into advice on reporting it
                first = first.__cause__
            said = f"{type(first).__name__}: {storage.reason(first)}"
            raise UserError(f"{what}: PyTorch's exporter cannot do this ({said})") from error
        finally:
            logging.disable(level)


def onnx_model(
    module: "torch.nn.Module",
    inputs: "Mapping[str, torch.Tensor]",
    free: Mapping[str, Mapping[int, object]],
    names: tuple[list[str], list[str]],
    **options: object,
) -> "onnx.ModelProto":
    """ONNX model of a PyTorch module.

    Args:
        inputs: an example of every argument of `forward`.
        free: {argument: {axis: torch.export.Dim}}.
        names: of the graph's (inputs, outputs).
        **options: more for `torch.onnx.export`.
    """
    import torch

    program = torch.onnx.export(
        module,
        kwargs=dict(inputs),
        dynamo=True,
        dynamic_shapes={name: free[name] for name in inputs},
        input_names=names[0],
        output_names=names[1],
        verbose=False,
        **options,
    )
    assert program is not None
    return program.model_proto


def check(
    what: str, model: bytes, inputs: Mapping[str, np.ndarray], expected: Sequence[np.ndarray]
) -> None:
    """Raises UserError where onnxruntime's first outputs differ from those of PyTorch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for ours, wanted in zip(session.run(None, dict(inputs)), expected, strict=False):
        difference = np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()
        if not difference <= TOLERANCE:
            raise UserError(
                f"{what}: onnxruntime differs from PyTorch by {difference:.1e} of the largest "
                f"number, expected {TOLERANCE:.0e}"
            )
