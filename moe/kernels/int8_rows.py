"""Experts of int8 over rows rounded to int8, each row by itself (W8A8), on Hopper.

The kernels sum in int32 and scale their sums; between them rows are rounded by one that reads them once.
`quantized_matmul`, `expert_mlp` and `routed_mlp` come here where `int8_rows_fit`; what they do elsewhere is
the reference.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.kernels import hopper
from moe.kernels.groups import Groups
from moe.kernels.round_rows import round_rows
from moe.quant.matrix import QuantizedMatrix

WIDE = 2048  # columns of a hidden layer from which rows are written down, see `hopper.gathers_first`


def int8_rows_fit(groups: Groups, x: Float[Array, "R D"], *matrices: Array | QuantizedMatrix) -> bool:
    """Whether the kernels take these, here: dynamic int8 matrices, and rows of two-byte numbers."""
    dynamic = all(
        isinstance(w, QuantizedMatrix) and w.format.dynamic and w.format.codes == "int8" for w in matrices
    )
    return dynamic and hopper.fits(groups, x, *(jax.ShapeDtypeStruct(w.shape, x.dtype) for w in matrices))


def int8_rows_product(
    rows: Float[Array, "R D"], w: Array | QuantizedMatrix, groups: Groups
) -> Float[Array, "R F"]:
    """rows[r] @ dequantize(w)[expert of r], rows rounded."""
    codes, scales = round_rows(rows, groups.used_tiles() * groups.tile)
    return hopper.int8_product(codes, scales, *_stored(w), groups, dtype=rows.dtype)


def int8_rows_mlp(
    x: Float[Array, "N D"],
    w_gate: Array | QuantizedMatrix,
    w_up: Array | QuantizedMatrix,
    w_down: Array | QuantizedMatrix,
    groups: Groups,
    token: Int[Array, "R"] | None = None,
) -> Float[Array, "R D"]:
    """(silu(x w_gate) * (x w_up)) w_down, what enters a product being rounded.

    Args:
        x: rows grouped by expert; with `token` what they are taken from.
        w_gate: of each expert, as the others such that `int8_rows_fit`.
        w_up: of each expert.
        w_down: of each expert.
        groups: layout of the rows.
        token: row of x for each row.
    """
    codes, scales = round_rows(x)
    if token is not None:
        scales = scales.at[token].get(mode="promise_in_bounds")
        if w_gate.shape[-1] >= WIDE:
            codes, token = codes.at[token].get(mode="promise_in_bounds"), None
    (gate, gate_scale), (up, up_scale) = map(_stored, (w_gate, w_up))
    of_columns = gate_scale, up_scale
    hidden = hopper.int8_swiglu(codes, scales, gate, up, of_columns, groups, token=token, dtype=x.dtype)
    return int8_rows_product(hidden, w_down, groups)


def _stored(w):
    """Codes, and the scale of each column."""
    return w.values, w.scales[..., 0].astype(jnp.float32)
