"""What a diffusers UNet config.json says, resolved per level."""

import dataclasses
import json

from hyperlora_jax.array_types import Json
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.configs import (
    check_divides,
    per_level,
    read_config,
    to_json,
)

NUM_SIZES = 6  # numbers that SDXL is told of a picture: its size, its crop, the size wanted
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_embedding_dim": None,
    "only_cross_attention": False,
    "time_cond_proj_dim": None,
}
_FIXED = {
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "num_attention_heads": (),
    "dual_cross_attention": (False,),
    "class_embed_type": (),
    "num_class_embeds": (),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (),
    "timestep_post_act": (),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (False,),
    "cross_attention_norm": (),
    "decay": (),
}
# upcast_attention: our scores and softmax are float32 always. addition_embed_type_num_heads belongs
# to an addition embedding that is refused by its own key.
_IGNORED = frozenset({"upcast_attention", "addition_embed_type_num_heads"})
_WHAT = "UNet"


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; tuples run over levels from fine to coarse."""

    in_channels: int
    out_channels: int
    sample_size: tuple[int, int]
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]  # in the order of the up blocks, coarse to fine
    mid_block: str | None
    num_heads: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]  # of every layer's transformer in a level
    up_depths: tuple[tuple[int, ...], ...]  # coarse to fine
    context_width: int
    num_groups: int
    epsilon: float
    use_linear_projection: bool
    flip_sin_to_cos: bool
    freq_shift: float
    time_width: int
    addition_time_width: int | None  # SDXL's text_time embedding; None without
    addition_input_width: int | None
    guidance_width: int | None  # of the embedding of a distilled guidance (LCM); None without
    source: str  # the config.json it was read from

    @property
    def num_levels(self) -> int:
        """Number of down blocks."""
        return len(self.channels)

    @staticmethod
    def from_dict(config: Json) -> "UNetConfig":
        """Reads a config.json. Raises UserError naming an unknown key or unsupported value."""
        v = read_config(config, _DEFAULTS, _FIXED, _IGNORED, _WHAT)
        levels = len(v["block_out_channels"])
        _check_only_cross_attention(v["only_cross_attention"])
        layers = per_level(v["layers_per_block"], levels, "layers_per_block", _WHAT)
        depths, up_depths = _depths(v, layers)
        heads = per_level(v["attention_head_dim"], levels, "attention_head_dim", _WHAT)
        for width, count in zip(v["block_out_channels"], heads, strict=True):
            widths = "block_out_channels"
            check_divides(v["norm_num_groups"], width, "norm_num_groups", widths, _WHAT)
            check_divides(count, width, "attention_head_dim", widths, _WHAT)
        size = v["sample_size"] or 64
        if isinstance(size, tuple) and len(size) != 2:
            raise UserError(f"{_WHAT} config: sample_size = {size!r}, expected one number or two")
        return UNetConfig(
            in_channels=v["in_channels"],
            out_channels=v["out_channels"],
            sample_size=size if isinstance(size, tuple) else (size, size),
            channels=v["block_out_channels"],
            layers=layers,
            down_attention=_attention_flags(v["down_block_types"], "Down", levels),
            up_attention=_attention_flags(v["up_block_types"], "Up", levels),
            mid_block=_mid_block(config.get("mid_block_type", v["mid_block_type"])),
            num_heads=heads,
            depths=depths,
            up_depths=up_depths,
            context_width=_context_width(v["cross_attention_dim"]),
            num_groups=v["norm_num_groups"],
            epsilon=float(v["norm_eps"]),
            use_linear_projection=bool(v["use_linear_projection"]),
            flip_sin_to_cos=bool(v["flip_sin_to_cos"]),
            freq_shift=float(v["freq_shift"]),
            time_width=v["time_embedding_dim"] or 4 * v["block_out_channels"][0],
            guidance_width=v["time_cond_proj_dim"],
            source=to_json(config),
            **_addition(v),
        )

    @property
    def config(self) -> dict[str, object]:
        """The config.json as read."""
        return json.loads(self.source)


def _attention_flags(types: tuple[str, ...], direction: str, levels: int) -> tuple[bool, ...]:
    key = f"{direction.lower()}_block_types"
    flags = {f"{direction}Block2D": False, f"CrossAttn{direction}Block2D": True}
    for name in types:
        if name not in flags:
            raise UserError(
                f"{_WHAT} config: {key} has {name!r}, which is not supported, expected one of "
                f"{sorted(flags)}"
            )
    if len(types) != levels:
        raise UserError(f"{_WHAT} config: {key} has {len(types)} values, expected {levels}")
    return tuple(flags[name] for name in types)


def _depths(
    v: Json, layers: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Depths of every layer's transformer, of the down blocks and of the up blocks."""
    down_key, up_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down = per_level(v[down_key], len(layers), down_key, _WHAT)
    if v[up_key] is None and any(isinstance(depth, tuple) for depth in down):
        raise UserError(
            f"{_WHAT} config: {down_key} = {down!r} differs within a block, expected {up_key} too"
        )
    up = per_level(v[up_key] or tuple(reversed(down)), len(layers), up_key, _WHAT)
    return (
        tuple(per_level(d, n, down_key, _WHAT) for d, n in zip(down, layers, strict=True)),
        tuple(per_level(d, n + 1, up_key, _WHAT) for d, n in zip(up, layers[::-1], strict=True)),
    )


def _mid_block(name: str | None) -> str | None:
    if name not in (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"):
        raise UserError(f"{_WHAT} config: mid_block_type = {name!r} is not supported")
    return name


def _check_only_cross_attention(value: object) -> None:
    if any(value) if isinstance(value, tuple) else value:
        raise UserError(f"{_WHAT} config: only_cross_attention = {value!r} is not supported")


def _context_width(value: int | tuple) -> int:
    widths = set(value) if isinstance(value, tuple) else {value}
    if len(widths) != 1:
        raise UserError(
            f"{_WHAT} config: cross_attention_dim = {value!r} is not supported, expected one width"
        )
    return widths.pop()


def _addition(values: Json) -> dict[str, int | None]:
    kind = values["addition_embed_type"]
    if kind is None:
        return {"addition_time_width": None, "addition_input_width": None}
    if kind != "text_time":
        raise UserError(
            f"{_WHAT} config: addition_embed_type = {kind!r} is not supported, expected "
            "'text_time' or null"
        )
    time, width = (
        values[key] for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    )
    if time is None or width is None or not 0 < NUM_SIZES * time < width:
        raise UserError(
            f"{_WHAT} config: projection_class_embeddings_input_dim is {width}, expected more than "
            f"{NUM_SIZES} x addition_time_embed_dim ({time})"
        )
    return {"addition_time_width": time, "addition_input_width": width}
