"""Rates that the present device reaches: products, causal attention, copies, and its smallest kernel."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.analysis.cost.forecast import Rates
from moe.analysis.cost.passes import score_flops
from moe.kernels.attention import causal_attention
from moe.mesh import MeshConfig, make_mesh
from moe.nn import TransformerConfig

ROUNDS = 7
CHAIN = 256  # of small kernels, each of which needs the one before
SIZES = {"gpu": (8192, 2**30, 2**14), "cpu": (1024, 2**27, 2**9)}  # product's side, bytes copied, tokens


def measured_rates(config: TransformerConfig, length: int) -> Rates:
    """Rates of the first local device, at the shapes and in the precision of a model.

    Args:
        config: whose heads attention has, and in whose precision products are.
        length: of the sequences in attention.
    """
    device = jax.local_devices()[0]
    side, size, tokens = SIZES["cpu" if device.platform == "cpu" else "gpu"]
    length = min(length, tokens)
    # Simulated CPU devices are one machine.
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    with jax.set_mesh(make_mesh(MeshConfig(), [device])):
        random = np.random.default_rng(0)

        def numbers(*shape: int, dtype: Any = config.dtype):
            return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

        operand = numbers(side, side)
        products = 2 * side**3 / seconds_of(jnp.matmul, operand, operand)

        rows = max(1, tokens // length)
        heads, groups, width = (getattr(config.attention, n) for n in ("heads", "kv_heads", "head_width"))
        q, kv = numbers(rows, length, heads, width), numbers(rows, length, groups, width)

        def attend(q, k, v):
            return causal_attention(q, k, v).astype(jnp.float32).sum()

        flops = 3 * rows * length * score_flops(config, length) / len(config.layers)
        attention = flops / seconds_of(jax.grad(attend, argnums=(0, 1, 2)), q, kv, kv)

        copied = jnp.zeros(size // 4, jnp.float32)
        bandwidth = 2 * size / seconds_of(lambda x: x + 1, copied)

        def chain(x, w):
            for _ in range(CHAIN):
                x = x @ w
            return x

        small = jnp.eye(16, dtype=config.dtype)
        kernel = seconds_of(chain, small, small) / CHAIN
    return Rates(products / sharing, attention / sharing, bandwidth / sharing, kernel)


def seconds_of(function: Callable, *operands: jax.Array) -> float:
    """Median of several runs, compiled."""
    compiled, seconds = jax.jit(function), []
    jax.block_until_ready(compiled(*operands))
    for _ in range(ROUNDS):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*operands))
        seconds.append(time.perf_counter() - started)
    return median(seconds)
