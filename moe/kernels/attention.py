"""Causal attention within each sequence: one implementation a platform, chosen in `causal_attention`.

    NVIDIA GPU  cuDNN's flash attention (`fits_cudnn` says where), whose memory grows with S
    TPU         JAX's splash attention (`fits_splash`), likewise
    other       XLA, which holds the scores of all pairs [B, H, S, S]

The choice is made while tracing, by the devices of the mesh, and not by `lax.platform_dependent`: that traces
every branch, and JAX lets cuDNN's be traced only where cuDNN is installed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

HEAD_WIDTHS = (64, 128)  # with which cuDNN was tried, forward and backward, for sequences of even length
SHORTEST_SEQUENCE = 128  # below, all scores fit the caches and a fused kernel gains nothing
LANES = 128  # of a TPU's registers, in whole numbers of which splash attention cuts heads and sequences
LARGEST_BLOCK = 1024  # positions that splash attention takes at a time


def causal_attention(
    q: Float[Array, "B S H h"], k: Float[Array, "B S G h"], v: Float[Array, "B S G h"]
) -> Float[Array, "B S H h"]:
    """softmax(q k^T / sqrt(h)) v over the same and earlier positions of the sequence.

    Each key and value head serves H / G neighbouring query heads (GQA, 2305.13245). Softmax is float32. Under
    cuDNN gradients come out of sums in no fixed order, so repeats may differ by rounding, unless XLA's flag
    `--xla_gpu_exclude_nondeterministic_ops` is set.

    Args:
        q: queries, split along batch and heads.
        k: keys, split likewise.
        v: values, split likewise.
    """
    layouts = tuple(jax.typeof(a).sharding.spec for a in (q, k, v))
    if fits_cudnn(q):
        fused = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        # The custom call knows no explicit axes.
        return jax.shard_map(fused, in_specs=layouts, out_specs=layouts[0])(q, k, v)
    if fits_splash(q):
        # Its Pallas calls do not say along which axes their results vary.
        return jax.shard_map(splash, in_specs=layouts, out_specs=layouts[0], check_vma=False)(q, k, v)
    return reference(q, k, v)


def splash(
    q: Float[Array, "B S H h"],
    k: Float[Array, "B S G h"],
    v: Float[Array, "B S G h"],
    *,
    interpret: bool = False,
) -> Float[Array, "B S H h"]:
    """The same by JAX's splash attention, which leaves out blocks of pairs that lie wholly ahead.

    With `interpret` its kernels are simulated, on any platform.
    """
    _, sequence, heads, width = q.shape
    block = block_length(sequence)
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((sequence, sequence))] * heads
    )
    kernel: Any = splash_attention_kernel.make_splash_mha_single_device(
        mask,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    # The kernel is of one sequence, heads first, and leaves the scale to the caller.
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)


def reference(
    q: Float[Array, "B S H h"], k: Float[Array, "B S G h"], v: Float[Array, "B S G h"]
) -> Float[Array, "B S H h"]:
    """The same in plain JAX, from the scores of all pairs."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def fits_cudnn(q: Float[Array, "B S H h"] | jax.ShapeDtypeStruct) -> bool:
    """Whether the devices of the mesh have cuDNN's kernel, forward and backward, for such queries."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    _, sequence, _, width = q.shape
    return (
        device is not None
        and device.device_kind.startswith("NVIDIA")
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and width in HEAD_WIDTHS
        and sequence % 2 == 0
        and sequence >= SHORTEST_SEQUENCE
    )


def block_length(sequence: int) -> int:
    """Positions that splash attention takes at a time, of a sequence in whole numbers of `LANES`."""
    return next(size for size in range(LARGEST_BLOCK, 0, -LANES) if sequence % size == 0)


def splash_cuts(sequence: int, width: int) -> bool:
    """Whether splash attention can cut sequences and heads of such lengths."""
    return sequence % LANES == 0 and width % LANES == 0


def fits_splash(q: Float[Array, "B S H h"]) -> bool:
    """Whether the devices of the mesh are TPUs, and splash attention can cut such queries."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    _, sequence, _, width = q.shape
    is_tpu = device is not None and device.platform == "tpu"
    return is_tpu and q.dtype == jnp.bfloat16 and splash_cuts(sequence, width)
