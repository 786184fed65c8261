"""Few rows times int8 matrices on a CPU: plain products, and whole SwiGLU experts; no gradients.

What bounds a decode step is reading weights. These read each once, at the rate of memory, from where it lies:
an expert's matrices are not copied out of their stack first. Sums are taken in float32 (`few_rows.cc`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.kernels.cpu import library
from moe.kernels.device import present_device
from moe.quant.matrix import QuantizedMatrix

MOST_ROWS = 4  # with more, XLA's products of int8 parts catch up


def fits(*matrices: Array | QuantizedMatrix) -> bool:
    """Whether these are weight-only int8 with one scale an output, on one CPU, and the kernels are there."""
    for w in matrices:
        if not isinstance(w, QuantizedMatrix) or w.format.codes != "int8" or w.format.dynamic:
            return False
        if w.scales.shape[-1] > 1:
            return False
    one_device = jax.sharding.get_abstract_mesh().size <= 1
    return one_device and present_device().platform == "cpu" and library.ready()


def product(rows: Float[Array, "R D"], w: QuantizedMatrix) -> Float[Array, "R F"]:
    """rows @ dequantize(w), in float32."""
    result = jax.ShapeDtypeStruct((rows.shape[0], w.shape[-1]), jnp.float32)
    return jax.ffi.ffi_call("switchyard_product", result)(rows.astype(jnp.float32), w.values, w.scales[:, 0])


def swiglu_experts(
    rows: Float[Array, "A D"],
    w_gate: QuantizedMatrix,
    w_up: QuantizedMatrix,
    w_down: QuantizedMatrix,
    expert: Int[Array, "A"],
) -> Float[Array, "A D"]:
    """(silu(rows w_gate) * (rows w_up)) w_down by the matrices of each row's expert, in float32.

    Args:
        rows: tokens.
        w_gate: of each expert.
        w_up: of each expert.
        w_down: of each expert.
        expert: of each row; a row whose number is that of none gives zeros.
    """
    stored = [part for w in (w_gate, w_up, w_down) for part in (w.values, w.scales[..., 0])]
    result = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    call = jax.ffi.ffi_call("switchyard_experts", result)
    return call(rows.astype(jnp.float32), expert.astype(jnp.int32), *stored)
