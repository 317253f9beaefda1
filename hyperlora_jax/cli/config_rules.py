"""What every value of a config may be: one table, key by key.

Names of choices come from the modules that make something of them. `*` stands for any beginning or
end: `*.dtype` are all dtypes without a row of their own; of several such rows the first counts.
"""

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ROUNDING = ("float32", "bfloat16")


@dataclass(frozen=True)
class Rule:
    """What a value may be.

    Attributes:
        expected: the same in words.
        accepts: value → whether it is allowed.
        choices: the allowed names, where it is one of a few.
    """

    expected: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(names: Iterable[str]) -> Rule:
    """One of a few names."""
    choices = tuple(names)
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


def whole(least: int, besides: tuple[int, ...] = ()) -> Rule:
    """An integer."""
    words = " or ".join([*map(str, besides), f"an integer of at least {least}"])
    return Rule(words, lambda v: type(v) is int and (v >= least or v in besides))


def number(above: float | None = None, least: float | None = None, below: float = 0.0) -> Rule:
    """A finite number, above or of at least some bound; `below` 0 is none."""
    words = f"above {above:g}" if above is not None else f"of at least {least:g}"
    words += f" and below {below:g}" if below else ""

    def accepts(value: Any) -> bool:
        if type(value) not in (int, float) or not abs(value) < float("inf"):
            return False
        enough = value > above if above is not None else value >= (least or 0.0)
        return enough and (not below or value < below)

    return Rule(f"a number {words}", accepts)


def optional(rule: Rule) -> Rule:
    """The same, or None."""
    return Rule(
        f"{rule.expected}, or None",
        lambda value: value is None or rule.accepts(value),
        rule.choices,
    )


def several(rule: Rule, least: int = 0) -> Rule:
    """A tuple of such values."""
    some = "one or more" if least else "any number"
    return Rule(
        f"a tuple of {some}, each {rule.expected}",
        lambda value: (
            isinstance(value, tuple) and len(value) >= least and all(map(rule.accepts, value))
        ),
    )


TEXT = Rule("a text", lambda value: isinstance(value, str))
FLAG = Rule("True or False", lambda value: isinstance(value, bool))
COUNT = whole(1)
NUMBER = number(least=0.0)
POSITIVE = number(above=0.0)
SHARE = number(least=0.0, below=1.0)
PAIR = Rule(
    "(fewest, most), two integers of at least 1",
    lambda value: (
        isinstance(value, tuple)
        and len(value) == 2
        and all(type(item) is int for item in value)
        and 1 <= value[0] <= value[1]
    ),
)
WINDOW = Rule("() or (first, last)", lambda value: value == () or PAIR.accepts(value))


@functools.cache
def table() -> Mapping[str, Rule]:
    """Rules by key."""
    from hyperlora_jax.diffusion.processes import PREDICTIONS, SAMPLERS
    from hyperlora_jax.distill.parametrisations import MIXTURES
    from hyperlora_jax.evaluate import method_loras
    from hyperlora_jax.hypernet import backbone, baselines, building
    from hyperlora_jax.hypernet.token_layout import HEADS
    from hyperlora_jax.lora.sites import PRESETS
    from hyperlora_jax.lora_files.writing import FORMATS
    from hyperlora_jax.stable_diffusion.networks.blocks import REMAT_POLICIES
    from hyperlora_jax.targets.gauged_targets import GAUGES
    from hyperlora_jax.train import optimizer
    from hyperlora_jax.train.trackers import PACKAGES
    from hyperlora_jax.worlds import fonts, heads
    from hyperlora_jax.worlds.avatar_styles import STYLES

    method = Rule(f"of {method_loras.method_names()}", method_loras.is_method)
    return {
        "task": one_of(("base", "unet", "avatar_encoder", "avatar_probe")),
        "base": TEXT,
        "*.seed": whole(0), "*_seed": whole(0), "*.init_seed": optional(whole(0)),
        "*.dtype": one_of(ROUNDING), "*.remat": one_of(REMAT_POLICIES),
        "*.num_steps": COUNT, "*.batch_size": COUNT, "*.encode_batch_size": COUNT,
        "*.log_every_steps": COUNT, "*.checkpoint_every_steps": COUNT,
        "*.ema_decay": optional(SHARE), "*.min_snr_gamma": optional(POSITIVE),
        # ---- data
        "data.source": TEXT, "data.style": one_of((*STYLES, heads.STYLE, fonts.STYLE)),
        "data.size": optional(whole(8)), "data.num_identities": optional(whole(0)),
        "data.num_views": COUNT, "data.bundle": TEXT, "data.skip_damaged": FLAG,
        "data.targets": TEXT, "data.target_weights": several(NUMBER),
        "data.gauge": one_of(GAUGES), "data.num_targets": whole(0),
        # ---- optimisers and recipes
        "*.learning_rate": POSITIVE, "*.warmup_steps": whole(0), "*.weight_decay": NUMBER,
        "*.clip_norm": optional(POSITIVE), "*.b1": SHARE, "*.b2": SHARE, "*.eps": POSITIVE,
        "*.final_fraction": NUMBER, "*.recipe.schedule": one_of(("constant", "cosine")),
        "*.optimizer.name": one_of(optimizer.NAMES),
        "*.optimizer.schedule": one_of(("cosine", "linear", "constant")),
        "*.images_per_step": COUNT, "*.accumulate": COUNT, "*.alpha": optional(POSITIVE),
        "*.prior_weight": NUMBER, "*.plateau_window": optional(COUNT), "*.plateau_drop": SHARE,
        # ---- distill
        "distill.num_concepts": optional(COUNT), "distill.rank": optional(COUNT),
        "distill.preset": optional(one_of(PRESETS)), "distill.num_slots": COUNT,
        "distill.steps_per_call": COUNT, "distill.save_every_steps": COUNT,
        "distill.buckets": FLAG, "distill.flips": FLAG, "distill.prompt": TEXT,
        "distill.encoders": several(TEXT), "distill.splits": one_of(("train", "hash")),
        "distill.prior.prompts": several(TEXT, 1), "distill.prior.num_images": COUNT,
        "distill.prior.guidance": NUMBER,
        # ---- model
        "model.encoder_options.mean": several(NUMBER),
        "model.encoder_options.std": several(POSITIVE),
        "model.encoder_options.image_size": several(COUNT),
        "model.encoder": TEXT, "model.preset": one_of(PRESETS), "model.rank": COUNT,
        "model.generator": one_of(building.GENERATORS), "model.condition_dropout": SHARE,
        "model.num_iterations": COUNT,
        "model.network.conditioning": one_of(backbone.CONDITIONINGS),
        "model.network.head": one_of(HEADS),
        "model.network.down": one_of(("generated", "learned")),
        "model.network.output": one_of(("lora", "whitened")),
        "model.network.up_scale": POSITIVE, "model.network.mlp_ratio": POSITIVE,
        "model.network.scan": FLAG, "model.network.remat": FLAG,
        "model.network.components_per_token": optional(COUNT),
        "model.diffusion.prediction": one_of(PREDICTIONS),
        "model.diffusion.denoiser": one_of(building.DENOISERS),
        "model.mlp.conditioning": one_of(backbone.CONDITIONINGS),
        "model.baseline.space": one_of(baselines.SPACES),
        "model.baseline.temperature": POSITIVE, "model.baseline.kernel_width": POSITIVE,
        "model.encoder.widths": several(COUNT, 1), "model.*": COUNT,
        # ---- train
        "train.batch_size": optional(COUNT), "train.num_steps": optional(COUNT),
        "train.batch_per_device": FLAG, "train.images_per_subject": COUNT,
        "train.num_references": PAIR, "train.from_scratch": FLAG,
        "train.caption_dropout": SHARE, "train.prior_caption": TEXT,
        "train.objectives.*": NUMBER, "train.warm_up.objectives.*": NUMBER,
        "train.warm_up.num_steps": whole(0), "train.keep": COUNT, "train.keep_best": whole(0),
        "train.trackers": several(one_of(PACKAGES)), "train.profile_steps": WINDOW,
        "train.stall_timeout_seconds": POSITIVE, "train.vae.workdir": TEXT,
        "train.augmentation.*": NUMBER, "train.weights.temperature": POSITIVE,
        "train.weights.*": NUMBER, "*.kl_weight": NUMBER, "*.l1_weight": NUMBER,
        # ---- pretrain
        "base.autoencoder.mid_block_add_attention": FLAG,
        "base.*.block_out_channels": several(COUNT, 1), "base.*": COUNT,
        "export.path": TEXT, "export.name": TEXT, "export.into_package": FLAG,
        "export.dtype": one_of(("float16", "float32")),
        # ---- generate
        "generate.format": one_of(FORMATS), "generate.num_samples": COUNT,
        "generate.guidance": NUMBER, "generate.sampler": one_of(SAMPLERS),
        # ---- evaluate
        "evaluate.source": TEXT, "evaluate.prompts": several(TEXT), "evaluate.probe": TEXT,
        "evaluate.judges.*": TEXT, "evaluate.others.*": TEXT, "evaluate.detector": TEXT,
        "evaluate.clip": TEXT, "evaluate.lpips": TEXT, "evaluate.guidance": NUMBER,
        "evaluate.strengths": several(POSITIVE, 1), "evaluate.guidances": several(NUMBER, 1),
        "evaluate.methods": several(method, 1),
        "evaluate.linear_combination.per": one_of(MIXTURES),
        "evaluate.steps_to_quality.num_identities": whole(0),
        "evaluate.steps_to_quality.checkpoints": several(whole(0), 1),
        "evaluate.*num_validation": optional(whole(0)),
        "evaluate.num_sampling_steps": COUNT, "evaluate.identities_per_batch": COUNT,
        "evaluate.refine.rank": COUNT, "evaluate.*num_slots": COUNT,
        "evaluate.*num_*": optional(COUNT),
        "mesh.*": whole(1, besides=(-1,)),
    }  # fmt: skip


def rule_of(key: str) -> Rule | None:
    """The rule of a key; None for one that the table does not know."""
    rules = table()
    if key in rules:
        return rules[key]
    return next((rule for name, rule in rules.items() if fnmatch.fnmatch(key, name)), None)
