"""Changes of a weight that are no product of two factors: LoHa, LoKr, DoRA.

With W a layer's weight in PyTorch's layout and s = alpha / rank:
    LoHa   ΔW = s · (w1_a w1_b) ∘ (w2_a w2_b)                     (Hyeon-Woo et al. 2022)
    LoKr   ΔW = s · w1 ⊗ w2, either of them a product, or whole   (LyCORIS; 1 if both are whole)
    DoRA   ΔW = (W + δ) · m / ‖W + δ‖ - W, δ any of the above or a LoRA's (Liu et al. 2024)
Convolutions are matrices [out, in·kh·kw], or have a core t [r, r, kh, kw] between their factors.
The norm of DoRA is taken over all but one axis: that of the outputs, or of the inputs.
"""

from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
DEFAULT_RANK = 32  # of LoRAs made of them


def delta(parts: Arrays, scale: float | None, weight: np.ndarray) -> np.ndarray:
    """ΔW, float64 [out, in(, kh, kw)], of tensors by their names in a file ("hada_w1_a", …,
    "down", "up", "magnitude"). `scale` None: alpha is the rank.

    Raises KeyError or ValueError where tensors are missing or do not fit the weight.
    """
    parts = {name: np.asarray(array, np.float64) for name, array in parts.items()}
    if "hada_w1_a" in parts:
        change = _product(parts, "hada_w1", "hada_t1") * _product(parts, "hada_w2", "hada_t2")
    elif any(name.startswith("lokr_") for name in parts):
        first, second = _product(parts, "lokr_w1", ""), _product(parts, "lokr_w2", "lokr_t2")
        if first.size * second.size != weight.size:  # before it fills the memory
            raise ValueError(f"{first.size} times {second.size} numbers, not {weight.size}")
        change = np.kron(first, second.reshape(len(second), -1))
    else:
        down, up = parts["down"], parts["up"]
        change = up.reshape(up.shape[:2]) @ down.reshape(len(down), -1)
    change = (1.0 if scale is None else scale) * change.reshape(weight.shape)
    if "magnitude" not in parts:
        return change
    whole, magnitude = weight + change, parts["magnitude"]
    axis = 0 if magnitude.ndim == 1 or magnitude.shape[0] == len(weight) else 1
    rest = tuple(i for i in range(whole.ndim) if i != axis)
    norm = np.sqrt(np.square(whole).sum(rest, keepdims=True))
    return whole * (magnitude.reshape(norm.shape) / np.maximum(norm, 1e-30)) - weight


def rank_of(parts: Arrays) -> int | None:
    """What alpha is divided by; None where both matrices of a LoKr are whole."""
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in parts:
            return len(parts[name])
    return None


def _product(parts: Arrays, name: str, core: str) -> np.ndarray:
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if core in parts:
        return np.einsum("ijkl,ip,jq->pqkl", parts[core], a, b, optimize=True)
    return a @ b
