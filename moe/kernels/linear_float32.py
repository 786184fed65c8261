"""The product of tokens with a narrow matrix, to the precision of float32: a router's logits.

NVIDIA GPU       bf16 products on the tensor cores: a float32 number is a sum of three bf16 ones, and
                 tokens in bf16 need no splitting
everywhere else  a float32 product
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.kernels.device import present_device

PARTS = 3  # bf16 numbers, of 8 bits each, that hold the 24 bits of a float32


def linear_float32(x: Float[Array, "G T D"], w: Float[Array, "D E"]) -> Float[Array, "G T E"]:
    """x @ w in float32, whatever the dtype of x. Gradients too, rounded to the dtypes of x and w."""
    device = present_device()
    if device.device_kind.startswith("NVIDIA") and x.dtype == jnp.bfloat16 and w.dtype == jnp.float32:
        return _by_parts(x, w)
    return reference(x, w)


def reference(x: Float[Array, "G T D"], w: Float[Array, "D E"]) -> Float[Array, "G T E"]:
    """The same as one product."""
    return jnp.matmul(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _by_parts(x, w):
    return _sum_of_parts(_dot("gtd,dn->gtn", x, _side_by_side(_parts(w))), w.shape[1])


def _forward(x, w):
    return _by_parts(x, w), (x, w)


def _backward(saved, y_bar):
    x, w = saved
    # Parts of order two and more, which a result in bf16 does not show, are left out.
    y_high, y_low, _ = _parts(y_bar)
    w_high, w_low, _ = _parts(w)
    x_bar = _dot(
        "gtn,dn->gtd", _side_by_side([y_high, y_high, y_low]), _side_by_side([w_high, w_low, w_high])
    )
    w_bar = _dot("gtd,gtn->dn", x, _side_by_side(_parts(y_bar)), out_sharding=jax.typeof(w).sharding)
    return x_bar.astype(x.dtype), _sum_of_parts(w_bar, w.shape[1])


_by_parts.defvjp(_forward, _backward)


def _parts(a: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """bf16 arrays whose sum is `a`, the largest first."""
    parts = []
    for _ in range(PARTS):
        # Said so explicitly, or XLA takes the way to bf16 and back for a detour.
        part = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        a = a - part
    return parts


def _side_by_side(parts):
    return jnp.concatenate(parts, axis=-1)


def _sum_of_parts(y, width: int):
    """Of equally wide columns."""
    return sum(y[..., i * width : (i + 1) * width] for i in reversed(range(PARTS)))


def _dot(terms: str, a, b, **kwargs):
    return jnp.einsum(terms, a, b, preferred_element_type=jnp.float32, **kwargs)
