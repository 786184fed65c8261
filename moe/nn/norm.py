"""Root-mean-square normalisation."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe.nn.parameter import ones


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32 (1910.07467 eq. 4)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = ones(width)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise; the result has the dtype of `x`."""
        return _normalise(x, self.scale[...], self.epsilon)


# Backward keeps `x` alone, which others keep too, and makes the two float32 arrays of its size again.
@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _normalise(x: Float[Array, "... D"], scale: Float[Array, "D"], epsilon: float) -> Float[Array, "... D"]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype)
