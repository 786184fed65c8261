"""Causal attention within each sequence: one implementation a platform, chosen in `causal_attention`.

    NVIDIA GPU  cuDNN's flash attention (`fits_cudnn` says where), whose memory grows with S
    other       XLA, which holds the scores of all pairs [B, H, S, S]

The choice is made while tracing, by the devices of the mesh, and not by `lax.platform_dependent`: that traces
every branch, and JAX lets cuDNN's be traced only where cuDNN is installed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HEAD_WIDTHS = (64, 128)  # with which cuDNN was tried, forward and backward, for sequences of even length
SHORTEST_SEQUENCE = 128  # below, all scores fit the caches and a fused kernel gains nothing


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
    if not fits_cudnn(q):
        return reference(q, k, v)
    fused = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    layouts = tuple(jax.typeof(a).sharding.spec for a in (q, k, v))
    # The custom call knows no explicit axes.
    return jax.shard_map(fused, in_specs=layouts, out_specs=layouts[0])(q, k, v)


def reference(
    q: Float[Array, "B S H h"], k: Float[Array, "B S G h"], v: Float[Array, "B S G h"]
) -> Float[Array, "B S H h"]:
    """The same in plain JAX, from the scores of all pairs."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def fits_cudnn(q: Float[Array, "B S H h"]) -> bool:
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
