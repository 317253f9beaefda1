"""Scaled dot-product attention: which implementation runs where.

xla     plain einsums, float32 scores and softmax statistics; any platform, any shape, a bias
cudnn   cuDNN's fused attention (GPU, 16-bit, head dim a multiple of 8)
splash  Pallas splash attention (TPU), inside `jax.shard_map` over batch and heads when a mesh is
        given: Mosaic kernels cannot be partitioned automatically. Head dims stay unpadded in HBM.
heads   one head after another, whose scores stay in the processor's cache and are computed again
        for the gradient; float32, on one device
auto    splash on TPU from 1024 tokens, cudnn on GPU for 16-bit heads up to 128, heads on a CPU from
        256 × 256 scores, else xla
"""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from hyperlora_jax.array_types import Array, Float
from hyperlora_jax.errors import UserError
from hyperlora_jax.stable_diffusion.networks.blocks import ATTENTION_OUTPUT

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "heads")
_SPLASH_TOKENS = 1024
_SPLASH_BLOCK = 512
_HEADS_SCORES = 2**16  # of a head: measured on two cores

Heads = Float[Array, "b n h d"]


def attend(
    query: Heads,
    key: Float[Array, "b m h d"],
    value: Float[Array, "b m h d"],
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> Heads:
    """softmax(q kᵀ / sqrt(d)) v by the implementation asked for. What the remat policy
    save_attention keeps carries the name ATTENTION_OUTPUT: the output, and of splash attention,
    which names its own, also the log-sum-exp that its gradient needs."""
    if implementation == "auto":
        implementation = choose(query, key, jax.default_backend())
        if implementation == "splash" and mesh is None and jax.device_count() > 1:
            implementation = "xla"  # XLA can partition a program for several devices, not Mosaic
        if implementation == "heads" and mesh is not None and mesh.size > 1:
            implementation = "xla"  # a loop over examples would run whole on every device
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention = {implementation!r}, expected one of {list(IMPLEMENTATIONS)}")
    if implementation == "splash" and splash_takes(query, key):
        return splash_attention(query, key, value, mesh)
    if implementation == "cudnn":
        out = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    elif implementation == "heads":
        out = attention_by_heads(query, key, value)
    else:
        out = xla_attention(query, key, value)
    return checkpoint_name(out, ATTENTION_OUTPUT)


def attend_within(
    query: Heads,
    key: Float[Array, "b n h d"],
    value: Float[Array, "b n h d"],
    shares: Float[Array, "b n k"],
) -> Heads:
    """Self-attention in which a position counts another by Σₖ of the product of their shares of
    region k: not at all where they have no region in common. Keeps n × n numbers."""
    shares = shares.astype(jnp.float32)
    common = jnp.einsum("bnk,bmk->bnm", shares, shares)
    bias = jnp.log(common + 1e-30)[:, None]
    return jax.nn.dot_product_attention(query, key, value, bias, implementation="xla")


Sized = jax.Array | jax.ShapeDtypeStruct


def choose(query: Sized, key: Sized, platform: str) -> str:
    """The implementation that "auto" stands for; arrays or ShapeDtypeStructs [b, n, h, d]."""
    head_dim = query.shape[-1]
    if platform == "tpu" and splash_takes(query, key):
        return "splash"
    if platform == "cpu" and query.dtype == jnp.float32:
        return "heads" if query.shape[1] * key.shape[1] >= _HEADS_SCORES else "xla"
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform in ("gpu", "cuda") and fits else "xla"


def splash_takes(query: Sized, key: Sized) -> bool:
    """Long self-attention only: short or ragged keys are faster as plain products."""
    tokens = query.shape[1]
    return tokens == key.shape[1] and tokens >= _SPLASH_TOKENS and tokens % 128 == 0


@jax.custom_vjp
def xla_attention(
    query: Heads, key: Float[Array, "b m h d"], value: Float[Array, "b m h d"]
) -> Heads:
    """Attention whose softmax is normalised after the product with v, on the smaller array.

    With p = exp(s - max s), l = Σ p, o = p v / l and the incoming gradient g:
        (1) ds = p (g vᵀ / l - (g · o) / l)   (the softmax Jacobian without a pass over n × m)
    """
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    scale = 1 / math.sqrt(query.shape[-1])
    scores = jnp.einsum("bnhd,bmhd->bhnm", query * scale, key, preferred_element_type=jnp.float32)
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    inverse = (1 / exponentials.sum(-1)).swapaxes(1, 2)[..., None]  # [b, n, h, 1], float32
    exponentials = exponentials.astype(value.dtype)
    product = jnp.einsum("bhnm,bmhd->bnhd", exponentials, value, preferred_element_type=jnp.float32)
    out = (product * inverse).astype(value.dtype)
    return out, (query, key, value, exponentials, inverse, out)


def _backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    query, key, value, exponentials, inverse, out = saved
    scale = 1 / math.sqrt(query.shape[-1])
    scaled = gradient.astype(jnp.float32) * inverse
    mean = (scaled * out).sum(-1).swapaxes(1, 2)[..., None]
    scaled = scaled.astype(value.dtype)
    weights = jnp.einsum("bnhd,bmhd->bhnm", scaled, value, preferred_element_type=jnp.float32)
    scores = (exponentials * (weights - mean)).astype(value.dtype)  # (1)
    return (
        jnp.einsum("bhnm,bmhd->bnhd", scores, key) * scale,
        jnp.einsum("bhnm,bnhd->bmhd", scores, query * scale),
        jnp.einsum("bhnm,bnhd->bmhd", exponentials, scaled),
    )


xla_attention.defvjp(_forward, _backward)


def attention_by_heads(
    query: Heads, key: Float[Array, "b m h d"], value: Float[Array, "b m h d"]
) -> Heads:
    """The same, a head of an example at a time."""
    batch, tokens, heads, width = query.shape

    def rows(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(batch * heads, -1, width)

    out = jax.lax.map(lambda one: _one_head(*one), (rows(query), rows(key), rows(value)))
    return out.reshape(batch, heads, tokens, width).swapaxes(1, 2)


@jax.custom_vjp
def _one_head(
    query: Float[Array, "n d"], key: Float[Array, "m d"], value: Float[Array, "m d"]
) -> Float[Array, "n d"]:
    return _one_forward(query, key, value)[0]


def _one_forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = (query / math.sqrt(query.shape[-1])) @ key.T
    largest = scores.max(-1, keepdims=True)
    exponentials = jnp.exp(scores - largest)
    total = exponentials.sum(-1, keepdims=True)
    out = exponentials @ value / total
    return out, (query, key, value, out, largest + jnp.log(total))


def _one_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    """(1) with p divided by l. Only arrays of d columns are turned, never n × m."""
    query, key, value, out, log_total = saved
    scale = 1 / math.sqrt(query.shape[-1])
    weights = jnp.exp((query * scale) @ key.T - log_total)
    mean = (gradient * out).sum(-1, keepdims=True)
    scores = weights * (gradient @ value.T - mean)
    return scores @ key * scale, ((query * scale).T @ scores).T, (gradient.T @ weights).T


_one_head.defvjp(_one_forward, _one_backward)


def causal_attention(query: Heads, key: Heads, value: Heads) -> Heads:
    """Token i attends to tokens 0 .. i."""
    scale, tokens = 1 / math.sqrt(query.shape[-1]), query.shape[1]
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32) * scale
    allowed = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(value.dtype), value)


def splash_attention(
    query: Heads, key: Heads, value: Heads, mesh: Mesh | None = None, interpret: bool = False
) -> Heads:
    """Splash attention per example, sharded over batch ("data", "fsdp") and heads ("tensor").

    Where "tensor" does not divide the heads, every chip of that axis computes all of them.

    Raises:
        UserError: the mesh does not divide the batch: every chip would compute the whole of it.
    """
    run = functools.partial(_splash, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return run(query, key, value)
    batch_axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    if query.shape[0] % math.prod(mesh.shape[axis] for axis in batch_axes):
        parts = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in batch_axes)
        raise UserError(
            f"splash attention: a batch of {query.shape[0]} cannot be split over {parts}; choose "
            "a batch size that they divide, or attention xla"
        )
    tensor = mesh.shape.get("tensor", 1)
    spec = PartitionSpec(
        batch_axes or None, None, "tensor" if tensor > 1 and query.shape[2] % tensor == 0 else None
    )
    return jax.shard_map(
        run, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )(query, key, value)


def _splash(query: Heads, key: Heads, value: Heads, interpret: bool) -> Heads:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, num_heads, head_dim = query.shape[1:]
    block = math.gcd(tokens, _SPLASH_BLOCK)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens)) for _ in range(num_heads)])
    kernel = kernels.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )
    heads_first = [x.swapaxes(1, 2) for x in (query / math.sqrt(head_dim), key, value)]
    attended = cast(Array, jax.vmap(kernel)(*heads_first))
    return attended.swapaxes(1, 2).astype(value.dtype)
