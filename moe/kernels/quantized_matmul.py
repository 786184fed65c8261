"""Products of rows with quantised matrices: one matrix for all rows, or each row times that of its expert.

    W8A16, CPU      a row or a few: `moe.kernels.cpu`; more, up to 64: rows as sums of int8 parts, then int8
                    products, faster than bf16
    W8A16, other    codes to the dtype of the rows, product, times the scale of each output
    W4A16, groups   weights to the dtype of the rows, product
    W8A8            rows rounded to codes with one scale a token, products in int32 (fp8: in float32)

Grouped by expert, this is done a tile of rows at a time, so that only experts in use are unpacked; on TPU
`lax.ragged_dot` takes them whole, and on Hopper rounded rows have kernels of their own (`int8_rows`) while
weight-only matrices are unpacked for the kernels of training, which pays for many rows; for few see
`touched_mlp`. A kernel for one platform is chosen in `quantized_matmul` and `quantized_grouped_matmul`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.kernels import hopper
from moe.kernels.cpu import few_rows as cpu
from moe.kernels.groups import TILES_AT_ONCE, Groups
from moe.kernels.int8_rows import int8_rows_fit, int8_rows_product
from moe.kernels.tiles import TileLoop
from moe.quant.matrix import QuantizedMatrix, dequantize, rescale
from moe.quant.rows import quantize_rows, split_rows

FEW_ROWS = 64  # up to which products with int8 parts are the faster ones on a CPU


def quantized_matmul(
    rows: Float[Array, "*n R D"], w: QuantizedMatrix, preferred_element_type=None
) -> Float[Array, "*n R F"]:
    """rows @ dequantize(w), with leading axes in common, in the dtype of `rows` unless said otherwise.

    With a dynamic format the rows are rounded too, each by itself.
    """
    product = _rounded if w.format.dynamic else _weight_only
    return product(rows, w).astype(preferred_element_type or rows.dtype)


def quantized_grouped_matmul(
    rows: Float[Array, "R D"], w: QuantizedMatrix, groups: Groups
) -> Float[Array, "R F"]:
    """rows[r] @ dequantize(w)[expert of r]; what `grouped_matmul` is for plain matrices."""
    experts, _, width = w.shape
    if groups.uniform:
        return quantized_matmul(rows.reshape(experts, -1, rows.shape[-1]), w).reshape(-1, width)
    if int8_rows_fit(groups, rows, w):
        return int8_rows_product(rows, w, groups)
    if not w.format.dynamic and hopper.fits(groups, rows, jax.ShapeDtypeStruct(w.shape, rows.dtype)):
        unpacked = jnp.swapaxes(dequantize(w, rows.dtype), 1, 2)
        return hopper.product(rows, unpacked, groups, transposed=True)
    return jax.lax.platform_dependent(
        rows,
        w,
        groups,
        cpu=partial(_tile_loop, at_once=TILES_AT_ONCE, all_tiles=False),
        cuda=partial(_tile_loop, at_once=1, all_tiles=True),
        tpu=_ragged_dot,
    )


def reference(rows: Float[Array, "*n R D"], w: QuantizedMatrix) -> Float[Array, "*n R F"]:
    """The same in float32: for tests."""
    if w.format.dynamic:
        codes, scales = quantize_rows(rows, w.format)
        rows = codes.astype(jnp.float32) * scales
    return jnp.matmul(rows.astype(jnp.float32), dequantize(w), precision=jax.lax.Precision.HIGHEST)


def _weight_only(rows, w):
    if rows.ndim == 2 and rows.shape[0] <= cpu.MOST_ROWS and cpu.fits(w):
        return cpu.product(rows, w)
    if w.format.codes == "int8" and w.scales.shape[-1] == 1 and rows.shape[-2] <= FEW_ROWS:
        return jax.lax.platform_dependent(rows, w, cpu=_in_parts, default=_upcast)
    return _upcast(rows, w)


def _in_parts(rows, w):
    parts = 2 if rows.dtype == jnp.bfloat16 else 3
    codes, scales = split_rows(rows, parts)
    products = _dot(codes, w.values, jnp.int32)
    return jnp.sum(products.astype(jnp.float32) * scales, axis=-2) * _by_output(w)


def _upcast(rows, w):
    if w.scales.shape[-1] == 1:
        return _dot(rows, w.codes().astype(rows.dtype), jnp.float32) * _by_output(w)
    y, first = 0.0, 0
    for codes, scales in w.planes():
        part = rows[..., first : first + codes.shape[-1]]
        y += _dot(part, rescale(codes, scales).astype(rows.dtype), jnp.float32)
        first += codes.shape[-1]
    return y


def _rounded(rows, w):
    codes, scales = quantize_rows(rows, w.format)
    if w.format.codes == "fp8":
        products = jax.lax.platform_dependent(codes, w.values, cpu=_dot_fp8_as_bf16, default=_dot_fp8)
    else:
        # XLA's CPU backend takes 5 times as long for a single row as for two.
        two = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, max(2 - codes.shape[-2], 0)), (0, 0)])
        products = _dot(two, w.values, jnp.int32)[..., : codes.shape[-2], :]
    return products.astype(jnp.float32) * scales * _by_output(w)


def _dot_fp8(x, w):
    return _dot(x, w, jnp.float32)


def _dot_fp8_as_bf16(x, w):
    return _dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), jnp.float32)


def _dot(x, w, dtype):
    """[*n, R, ..., D] and [*n, F, D] to [*n, R, ..., F]."""
    leading = tuple(range(w.ndim - 2))
    dimensions = (((x.ndim - 1,), (w.ndim - 1,)), (leading, leading))
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=dtype)


def _by_output(w):
    """Scales [*n, 1, F] of output channels."""
    return jnp.swapaxes(w.scales, -1, -2).astype(jnp.float32)


def _tile_loop(rows, w, groups, *, at_once, all_tiles):
    loop = TileLoop.over(groups, rows.shape[0], at_once=at_once, all_tiles=all_tiles)

    def body(i, out):
        of_tiles = jax.tree.map(lambda leaf: loop.matrices(leaf, i), w)
        return loop.put(out, quantized_matmul(loop.rows(rows, i), of_tiles), i)

    return loop.run(body, jnp.zeros_like(rows, shape=(rows.shape[0], w.shape[-1])))


def _ragged_dot(rows, w, groups):
    sizes = groups.padded_sizes()
    experts = jnp.repeat(groups.tile_experts(rows.shape[0] // groups.tile), groups.tile)

    def dot(x, matrices, dtype):
        return jax.lax.ragged_dot_general(x, matrices, sizes, OF_STORED, preferred_element_type=dtype)

    if w.format.dynamic:
        codes, scales = quantize_rows(rows, w.format)
        products = dot(codes, w.values, jnp.float32 if w.format.codes == "fp8" else jnp.int32)
        y = products.astype(jnp.float32) * scales * w.scales[experts, :, 0]
    elif w.scales.shape[-1] == 1:
        y = dot(rows, w.codes().astype(rows.dtype), jnp.float32) * w.scales[experts, :, 0]
    else:
        y = dot(rows, jnp.swapaxes(dequantize(w, rows.dtype), 1, 2), jnp.float32)
    return y.astype(rows.dtype)


# Rows [R, D] with matrices [E, F, D]; the rows of an expert lie together.
OF_STORED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
