"""Stable Diffusion's UNet in plain PyTorch with LoRA: the peer where diffusers is not installed.

Same layers, widths and arithmetic as diffusers' UNet2DConditionModel (SD 1.x: 1×1 convolution
projections, fused scaled_dot_product_attention), for timing only.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoraLinear(nn.Module):
    """Frozen linear layer plus a trainable pair of rank r."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, bias: bool = False):
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out, bias=bias).requires_grad_(False)
        self.down = nn.Linear(fan_in, rank, bias=False)
        self.up = nn.Linear(rank, fan_out, bias=False)

    def forward(self, x):
        """base(x) + up(down(x))."""
        return self.base(x) + self.up(self.down(x))


class Attention(nn.Module):
    """Multi-head attention with LoRA on q, k, v and out."""

    def __init__(self, width: int, context: int, heads: int, rank: int):
        super().__init__()
        self.heads = heads
        self.q = LoraLinear(width, width, rank)
        self.k = LoraLinear(context, width, rank)
        self.v = LoraLinear(context, width, rank)
        self.out = LoraLinear(width, width, rank, bias=True)

    def forward(self, x, context):
        """Attends to context."""
        b, n, c = x.shape
        q, k, v = (
            y.view(b, -1, self.heads, c // self.heads).transpose(1, 2)
            for y in (self.q(x), self.k(context), self.v(context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Transformer(nn.Module):
    """Group norm, 1×1 projection, one transformer block, 1×1 projection, residual."""

    def __init__(self, width: int, context: int, heads: int, rank: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, heads, rank)
        self.attn2 = Attention(width, context, heads, rank)
        self.ff_in, self.ff_out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x, context):
        """Positions as tokens."""
        b, c, h, w = x.shape
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, c)
        z = self.norms[0](y)
        y = y + self.attn1(z, z)
        y = y + self.attn2(self.norms[1](y), context)
        hidden, gate = self.ff_in(self.norms[2](y)).chunk(2, -1)
        y = y + self.ff_out(hidden * F.gelu(gate))
        return x + self.proj_out(y.reshape(b, h, w, c).permute(0, 3, 1, 2))


class Resnet(nn.Module):
    """Residual block with a time embedding."""

    def __init__(self, width_in: int, width: int, time: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width_in), nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(time, width)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x, time):
        """x plus its residual."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class TorchUNet(nn.Module):
    """The UNet; LoRA factors are the only trainable parameters."""

    def __init__(self, config: dict, rank: int):
        super().__init__()
        widths, layers = config["block_out_channels"], config.get("layers_per_block", 2)
        context, heads = config["cross_attention_dim"], config["attention_head_dim"]
        groups, self.width, time = config.get("norm_num_groups", 32), widths[0], 4 * widths[0]
        default = ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"]
        attends = ["CrossAttn" in name for name in config.get("down_block_types", default)]

        def transformer(width):
            return Transformer(width, context, heads, rank, groups)

        self.time = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        skips, current = [widths[0]], widths[0]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(Resnet(current, width, time, groups))
                block.append(transformer(width) if attends[level] else nn.Identity())
                current = width
                skips.append(width)
            if level < len(widths) - 1:
                block.append(nn.Conv2d(width, width, 3, 2, 1))
                skips.append(width)
            self.down.append(block)
        ends = [Resnet(current, current, time, groups) for _ in range(2)]
        self.mid = nn.ModuleList([ends[0], transformer(current), ends[1]])
        for level in reversed(range(len(widths))):
            block = nn.ModuleList()
            for _ in range(layers + 1):
                block.append(Resnet(current + skips.pop(), widths[level], time, groups))
                block.append(transformer(widths[level]) if attends[level] else nn.Identity())
                current = widths[level]
            if level > 0:
                block.append(nn.Conv2d(current, current, 3, padding=1))
            self.up.append(block)
        self.norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config["out_channels"], 3, padding=1)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".down.weight" in name or ".up.weight" in name)

    def forward(self, x, timesteps, context):
        """Prediction [b, c, h, w]."""
        half = self.width // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float32)
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * steps / half)
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down:
            for layer in block:  # pyright: ignore
                x = _call(layer, x, time, context)
                if not isinstance(layer, Resnet):
                    skips.append(x)
        for layer in self.mid:
            x = _call(layer, x, time, context)
        for block in self.up:
            for layer in block:  # pyright: ignore
                if isinstance(layer, Resnet):
                    x = torch.cat([x, skips.pop()], 1)
                elif isinstance(layer, nn.Conv2d):
                    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = _call(layer, x, time, context)
        return self.conv_out(F.silu(self.norm_out(x)))


def _call(layer, x, time, context):
    if isinstance(layer, Resnet):
        return layer(x, time)
    return layer(x, context) if isinstance(layer, Transformer) else layer(x)
