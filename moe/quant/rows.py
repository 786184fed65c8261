"""Activations rounded while running: one scale a token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.quant.format import Format


def quantize_rows(x: Float[Array, "*n D"], format: Format) -> tuple[Int[Array, "*n D"], Float[Array, "*n 1"]]:
    """Codes and float32 scales of each row, its largest number being the largest code.

    Needs no calibration, and a token is rounded the same whatever batch it comes in.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scales = jnp.maximum(largest / format.largest, jnp.finfo(jnp.float32).tiny)
    codes = x / scales if format.codes == "fp8" else jnp.round(x / scales)
    # Rounding may leave the quotient a hair above the largest code.
    return jnp.clip(codes, -format.largest, format.largest).astype(format.dtype), scales


def split_rows(
    x: Float[Array, "*n D"], parts: int
) -> tuple[Int[Array, "*n parts D"], Float[Array, "*n parts 1"]]:
    """Rows as a sum of int8 numbers times scales: rows = sum over parts of codes * scales.

    Each part holds what the one before left over, and adds eight bits: two parts are finer than bfloat16 next
    to a row's largest number, three come to float32. Integer products with them are exact.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    rest, codes, scales = x / scale, [], []
    for part in range(parts):
        codes.append(jnp.clip(jnp.round(rest), -127, 127))
        scales.append(scale / REFINEMENT**part)
        rest = (rest - codes[-1]) * REFINEMENT
    return jnp.stack(codes, axis=-2).astype(jnp.int8), jnp.stack(scales, axis=-2)


REFINEMENT = 254  # a remainder of at most half a step fills the next part's range of -127 to 127
