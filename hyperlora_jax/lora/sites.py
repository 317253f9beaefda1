"""Which layers of a base model carry a LoRA: sites, specs, presets.

A `LoraSpec` is the only description of the adapted layers. The token layout, the flat-vector
layout, the statistics, the file formats and the validation derive from it. Paths are those of
diffusers' `named_modules()`; text encoder sites start with "text_encoder." or "text_encoder_2.".

A LoRA tree is a nested dict keyed by `module_path(site.path)` with the leaves
    linear  down [l?, in, r]          up [l?, r, out]      delta = down @ up
    conv    down [l?, kh, kw, in, r]  up [l?, r, out]      delta = einsum("hwir,ro->hwio")
The leading axis l is present for a batch of LoRAs. Every tree is folded: there is no alpha.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hyperlora_jax.array_types import Params
from hyperlora_jax.errors import UserError

if TYPE_CHECKING:
    from hyperlora_jax.array_types import AnyArray

PRESETS: dict[str, tuple[str, ...]] = {
    "w2w": (r"\.attn[12]\.to_[qv]$",),
    "attn-qkvo": (r"\.attn[12]\.(to_[qkv]|to_out\.0)$",),
    "attn-ff": (r"(^|\.)attentions\.\d+\.",),
    "all": (r"(^|\.)(attentions|resnets|downsamplers|upsamplers)\.\d+\.",),
    "text": (r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$",),
}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# Module lists of diffusers and transformers: the only names whose trailing number is an index.
_LISTS = (
    "down_blocks|up_blocks|attentions|resnets|downsamplers|upsamplers|transformer_blocks"
    "|net|to_out|layers"
)
_STRIDED = re.compile(r"(^|\.)downsamplers\.\d+\.conv$")


@functools.lru_cache(maxsize=1 << 16)
def module_path(path: str) -> tuple[str, ...]:
    """Flax path of a diffusers module path: "a.0.b" -> ("a_0", "b")."""
    return tuple(re.sub(r"\.(\d+)(?=\.|$)", r"_\1", path).split("."))


def torch_path(parts: Sequence[str]) -> str:
    """Inverse of `module_path`: ("attentions_0", "proj_in") -> "attentions.0.proj_in"."""
    return ".".join(re.sub(rf"^({_LISTS})_(\d+)$", r"\1.\2", part) for part in parts)


@dataclasses.dataclass(frozen=True, order=True)
class LoraSite:
    """One adapted layer. `path` is its diffusers module path; sizes are features."""

    path: str
    in_features: int
    out_features: int
    rank: int
    kind: Literal["linear", "conv"] = "linear"
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)

    @property
    def module_path(self) -> tuple[str, ...]:
        """Where the factors lie in a LoRA tree."""
        return module_path(self.path)

    @property
    def component(self) -> str:
        """Model that the site belongs to: "unet", "text_encoder" or "text_encoder_2"."""
        head = self.path.split(".", 1)[0]
        return head if head in TEXT_ENCODERS else "unet"

    @property
    def down_shape(self) -> tuple[int, ...]:
        """Shape of the down factor of one LoRA."""
        window = self.kernel_size if self.kind == "conv" else ()
        return (*window, self.in_features, self.rank)

    @property
    def up_shape(self) -> tuple[int, ...]:
        """Shape of the up factor of one LoRA."""
        return (self.rank, self.out_features)

    @property
    def fan_in(self) -> int:
        """Inputs of one output number: in, or kh·kw·in for a convolution."""
        return self.in_features * self.kernel_size[0] * self.kernel_size[1]

    @property
    def num_parameters(self) -> int:
        """Numbers in both factors."""
        return self.rank * (self.fan_in + self.out_features)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Sites in lexicographic order of their paths. Hashable: usable as a static jit argument."""

    sites: tuple[LoraSite, ...]

    def __post_init__(self):
        paths = [site.path for site in self.sites]
        if paths != sorted(set(paths)):
            object.__setattr__(self, "sites", tuple(sorted(self.sites)))
            if len(set(paths)) != len(paths):
                twice = sorted({path for path in paths if paths.count(path) > 1})
                raise ValueError(f"sites named twice in a LoraSpec: {twice[:5]}")

    def __hash__(self) -> int:
        # Of the fingerprint, which is kept: hashing hundreds of sites costs 0.1 ms each time.
        return int(self.fingerprint[:15], 16)

    def __repr__(self) -> str:
        ranks = sorted({site.rank for site in self.sites})
        shown = "–".join(str(rank) for rank in (ranks[:1] + ranks[1:][-1:]))
        return f"LoraSpec({len(self)} sites, rank {shown}, {self.fingerprint[:12]})"

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[LoraSite]:
        return iter(self.sites)

    @functools.cached_property
    def by_path(self) -> dict[str, LoraSite]:
        """Sites by diffusers module path."""
        return {site.path: site for site in self.sites}

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON: equal for equal specs, on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def num_parameters(self) -> int:
        """Numbers in one LoRA of this spec."""
        return sum(site.num_parameters for site in self.sites)

    @property
    def max_rank(self) -> int:
        """Largest rank of any site; 0 for an empty spec."""
        return max((site.rank for site in self.sites), default=0)

    def with_rank(self, rank: int) -> "LoraSpec":
        """The same sites, all of this rank."""
        if all(site.rank == rank for site in self.sites):
            return self
        return LoraSpec(tuple(dataclasses.replace(site, rank=rank) for site in self.sites))

    def component(self, name: str) -> "LoraSpec":
        """Only the sites of one model: "unet", "text_encoder" or "text_encoder_2"."""
        return LoraSpec(tuple(site for site in self.sites if site.component == name))

    def to_json(self) -> str:
        """Canonical JSON; `from_json` reads it back."""
        rows = [
            [s.path, s.in_features, s.out_features, s.rank, s.kind, *s.kernel_size, *s.stride]
            for s in self.sites
        ]
        return json.dumps({"sites": rows}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "LoraSpec":
        """Reads `to_json`'s text. Raises UserError when it is something else."""
        try:
            rows = json.loads(text)["sites"]
            sites = [
                LoraSite(p, int(i), int(o), int(r), kind, (int(kh), int(kw)), (int(sh), int(sw)))
                for p, i, o, r, kind, kh, kw, sh, sw in rows
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"LoRA spec: expected the JSON of LoraSpec, got {text[:60]!r}"
            ) from error
        return LoraSpec(tuple(sites))


def chosen_by(preset: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a path is of a preset's layers: a name of `PRESETS`, or regular expressions."""
    if isinstance(preset, str) and preset not in PRESETS:
        raise UserError(f"LoRA preset {preset!r} is unknown; expected one of {sorted(PRESETS)}")
    rules = [re.compile(rule) for rule in (PRESETS[preset] if isinstance(preset, str) else preset)]
    return lambda path: any(rule.search(path) for rule in rules)


def spec_from_shapes(
    param_shapes: Params,
    preset: str | Sequence[str] = "attn-qkvo",
    rank: int = 4,
    prefix: str = "",
) -> LoraSpec:
    """Spec of every layer of a model whose path matches the preset.

    `param_shapes` is the model's Flax parameter tree (arrays or ShapeDtypeStructs) with kernels
    [in, out] or [kh, kw, in, out]; `preset` is a name of `PRESETS` or regular expressions
    (searched in the diffusers path); `prefix` is "" for a UNet and "text_encoder." for a text
    encoder.
    """
    chosen = chosen_by(preset)
    if rank < 1:
        raise UserError(f"LoRA rank is {rank}; expected at least 1")
    sites = []
    for path, shape in _kernels(param_shapes):
        if not chosen(path):
            continue
        kind = "linear" if len(shape) == 2 else "conv"
        window = (1, 1) if kind == "linear" else (shape[0], shape[1])
        stride = (2, 2) if _STRIDED.search(path) else (1, 1)
        sites.append(LoraSite(prefix + path, shape[-2], shape[-1], rank, kind, window, stride))
    if not sites:
        raise UserError(f"LoRA preset {preset!r} matches no layer of the model")
    return LoraSpec(tuple(sites))


def _kernels(param_shapes: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    import jax

    for keys, leaf in jax.tree_util.tree_flatten_with_path(param_shapes)[0]:
        names = [str(key.key) for key in keys]
        if names[-1] == "kernel" and len(leaf.shape) in (2, 4):
            yield torch_path(names[:-1]), tuple(int(size) for size in leaf.shape)


def site_factors(lora: Params, site: LoraSite) -> Params:
    """The {"down", "up"} pair of one site of a LoRA tree. Raises KeyError when it is absent."""
    return functools.reduce(lambda tree, name: tree[name], site.module_path, lora)


def component_tree(lora: Params, name: str) -> Params:
    """Sub-tree of one model, as its `apply` takes it: {} when the LoRA has no site there."""
    if name in TEXT_ENCODERS:
        return lora.get(name, {})
    return {key: value for key, value in lora.items() if key not in TEXT_ENCODERS}


def tree_from_sites(pairs: Params) -> Params:
    """Nested LoRA tree from {diffusers path: {"down", "up"}}."""
    tree = {}
    for path, factors in pairs.items():
        *parents, leaf = module_path(path)
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = factors
    return tree


def validate(lora: Params, spec: LoraSpec) -> None:
    """Checks that a LoRA tree has exactly the sites, shapes and one common batch of the spec.

    Raises UserError naming the first site that differs. Works on arrays and ShapeDtypeStructs.
    """
    ordered_factors(lora, spec)


def ordered_factors(lora: Params, spec: LoraSpec) -> "list[tuple[AnyArray, AnyArray]]":
    """[(down, up)] in the order of the spec's sites. Raises like `validate`."""
    import jax

    leaves, structure = jax.tree.flatten(lora)
    batch = None
    pairs = []
    for site, (down, up) in zip(spec.sites, _leaf_numbers(structure, spec), strict=True):
        for side, number, shape in (("down", down, site.down_shape), ("up", up, site.up_shape)):
            got = tuple(leaves[number].shape)
            lead = got[: len(got) - len(shape)]
            if len(lead) > 1 or got[len(lead) :] != shape:
                raise UserError(f"LoRA site {site.path}.{side}: shape {got}, expected {shape}")
            if batch is None:
                batch = lead
            if lead != batch:
                raise UserError(f"LoRA site {site.path}.{side}: batch {lead}, elsewhere {batch}")
        pairs.append((leaves[down], leaves[up]))
    return pairs


@functools.lru_cache(maxsize=64)
def _leaf_numbers(structure: Any, spec: LoraSpec) -> tuple[tuple[int, int], ...]:
    """Which leaves of a tree are the (down, up) of each site: names are compared once a kind."""
    import jax

    numbered = jax.tree.unflatten(structure, range(structure.num_leaves))
    leaves = jax.tree_util.tree_flatten_with_path(numbered)[0]
    numbers = {tuple(str(key.key) for key in keys): number for keys, number in leaves}
    expected = {(*site.module_path, side) for site in spec.sites for side in ("down", "up")}
    if missing := sorted(expected - set(numbers)):
        name = torch_path(missing[0])
        raise UserError(f"LoRA lacks {len(missing)} factors of its spec, first {name}")
    if extra := sorted(set(numbers) - expected):
        name = torch_path(extra[0])
        raise UserError(f"LoRA has {len(extra)} factors that its spec does not name, first {name}")
    return tuple(
        (numbers[(*site.module_path, "down")], numbers[(*site.module_path, "up")])
        for site in spec.sites
    )
