"""A PyTorch UNet whose LoRAs are inputs: every row of a batch has a LoRA and a strength of its own.

A layer of the spec gives, for row k of its batch,
    linear  base(x)[k] + strength[k] · x[k] · downᵀ[k] · upᵀ[k]
    conv    base(x)[k] + strength[k] · up[k] · (down[k] ∗ x[k])        ∗ at the layer's stride
without ever forming up · down. The factors of a row come in one flat vector, laid out as in
`lora/vectorize.py`: sites in the spec's order, down before up, each in PyTorch's memory order.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D

from hyperlora_jax.lora.sites import LoraSpec


class LoraInputs(torch.nn.Module):
    """diffusers' UNet2DConditionModel with two inputs more: `lora` [b, d] and `strength` [b]."""

    def __init__(self, unet: torch.nn.Module, spec: LoraSpec):
        super().__init__()
        self.unet, self.spec = unet, spec
        # A plain dict, so that tracing does not take the factors of one call for parameters.
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.__dict__["factors"] = factors
        layers = dict(unet.named_modules())
        for site in spec.sites:
            change = functools.partial(_changed, factors, site.path)
            layers[site.path].register_forward_hook(change)
        for layer in layers.values():
            if isinstance(layer, Upsample2D):
                layer.forward = functools.partial(_upsampled, layer)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        lora: torch.Tensor,
        strength: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the UNet predicts, [b, c, h, w].

        Args:
            sample: noisy latents [b, c, h, w].
            timestep: [b]; rows may be at different steps.
            encoder_hidden_states: text states [b, n, e].
            lora: flat LoRAs [b, d]; zeros are no LoRA.
            strength: [b].
            text_embeds, time_ids: of SDXL, [b, p] and [b, 6].
            timestep_cond: of a UNet that was distilled with its guidance, [b, w].
        """
        xl = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        self.factors.update(self._cut(lora, strength))
        try:
            return self.unet(
                sample,
                timestep,
                encoder_hidden_states,
                timestep_cond=timestep_cond,
                added_cond_kwargs=xl,
                return_dict=False,
            )[0]
        finally:
            self.factors.clear()

    def _cut(
        self, lora: torch.Tensor, strength: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{path: (down [b, r, i, kh, kw] or [b, r, i], up [b, o, r] · strength)}."""
        sizes = [
            size
            for site in self.spec.sites
            for size in (site.rank * site.fan_in, site.out_features * site.rank)
        ]
        parts = iter(lora.split(sizes, dim=1))
        pairs = {}
        for site in self.spec.sites:
            window = site.kernel_size if site.kind == "conv" else ()
            down = next(parts).unflatten(1, (site.rank, site.in_features, *window))
            up = next(parts).unflatten(1, (site.out_features, site.rank))
            pairs[site.path] = down, up * strength[:, None, None]
        return pairs


def _upsampled(
    layer: Any, x: torch.Tensor, output_size: Sequence[int] | None = None
) -> torch.Tensor:
    """Twice as large, then the convolution. diffusers asks for the batch's size before it copies
    large ones, a question that would hold every batch of the graph to one answer."""
    if output_size is not None:
        raise ValueError(f"expected sizes that the UNet halves evenly, found {tuple(output_size)}")
    return layer.conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _changed(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    path: str,
    layer: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """The layer's output with the LoRA of each row added."""
    down, up = factors[path]
    if isinstance(layer, torch.nn.Linear):
        return output + _linear(inputs[0], down, up)
    return output + _conv(inputs[0], down, up, layer, output)


def _linear(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    rows = x.unsqueeze(1) if x.ndim == 2 else x
    change = torch.bmm(torch.bmm(rows, down.transpose(1, 2)), up.transpose(1, 2))
    return change.squeeze(1) if x.ndim == 2 else change


def _conv(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    layer: Any,
    output: torch.Tensor,
) -> torch.Tensor:
    """The products with all taps of the window are one matrix product; a convolution of ones and
    zeros shifts and sums them, when only r channels are left. A grouped convolution would need the
    batch as a constant of the graph."""
    taps = down.permute(0, 3, 4, 1, 2).flatten(1, 3)  # [b, kh·kw·r, i]
    inner = torch.bmm(taps, x.flatten(2)).unflatten(2, x.shape[2:])
    rank, (kh, kw) = down.shape[1], layer.kernel_size
    if (kh, kw) != (1, 1):
        ones = torch.eye(kh * kw * rank, dtype=x.dtype).unflatten(0, (kh, kw, rank))
        shifts = ones.permute(2, 3, 0, 1)  # [r, kh·kw·r, kh, kw]
        inner = torch.nn.functional.conv2d(inner, shifts, None, layer.stride, layer.padding)
    return torch.bmm(up, inner.flatten(2)).unflatten(2, output.shape[2:])
