"""The product of tokens with one matrix."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from moe.kernels.merge import merge, split
from moe.kernels.observe import ObservedMatrix, observe
from moe.kernels.quantized_matmul import quantized_matmul
from moe.quant.matrix import QuantizedMatrix


def linear(
    x: Float[Array, "B S D"],
    w: Float[Array, "D F"] | QuantizedMatrix | ObservedMatrix,
    preferred_element_type=None,
) -> Float[Array, "B S F"]:
    """x @ w, for activations split along batch and sequence, and a matrix that may be split over devices too.

    Along its columns, the result is split likewise; along its rows, as the last axis of x then is, the result
    is summed over the devices.

    The two leading axes are made one first: with both of them contracted, as in the gradient of `w`, XLA's
    CPU backend takes a bf16 product 20 times slower. A single bf16 row goes in twice: a product of a vector
    and a matrix takes up to 10 times as long there.
    """
    tokens, axes = merge(x), jax.typeof(x).sharding.spec
    if isinstance(w, ObservedMatrix):
        tokens, w = observe(tokens, w.moment), w.values
    if isinstance(w, QuantizedMatrix):
        y = quantized_matmul(tokens, w, preferred_element_type)
    else:
        layout = P(jax.typeof(tokens).sharding.spec[0], jax.typeof(w).sharding.spec[1])
        if tokens.shape[0] == 1 and x.dtype == jnp.bfloat16:
            tokens = jnp.concatenate([tokens, tokens])
        y = jnp.matmul(tokens, w, preferred_element_type=preferred_element_type, out_sharding=layout)
        y = y[: x.shape[0] * x.shape[1]]
    return split(y, x.shape[0], P(*axes[:2]))
