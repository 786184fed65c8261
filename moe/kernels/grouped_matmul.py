"""Grouped matrix product: each row times the matrix of its expert. The heart of every expert layer.

One implementation a platform, chosen in `product` and `transpose_product`:

    Hopper         kernels of `moe.kernels.hopper`, for numbers of two bytes
    GPU            Triton kernels, from Ampere on (`moe.kernels.grouped_matmul_triton`)
    CPU, old GPU   a loop over row tiles (`moe.kernels.tiles`)
    TPU            `lax.ragged_dot`, which lowers to a native grouped kernel there

`lax.ragged_dot` is not used on CPU and GPU because it expands to a dense product over all experts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.kernels import grouped_matmul_triton as triton
from moe.kernels import hopper
from moe.kernels.groups import TILES_AT_ONCE, Groups
from moe.kernels.quantized_matmul import quantized_grouped_matmul
from moe.kernels.tiles import TileLoop, multiply, multiply_transposed
from moe.quant.matrix import QuantizedMatrix


def grouped_matmul(
    rows: Float[Array, "R D"], w: Float[Array, "E D F"] | QuantizedMatrix, groups: Groups
) -> Float[Array, "R F"]:
    """rows[r] @ w[expert of r], accumulated in float32, in the dtype of `rows`.

    Differentiable in `rows` and `w`, unless `w` is quantised. Rows of padding give unspecified finite values
    and must receive zero cotangents; the dispatch does so because it never reads them.
    """
    if isinstance(w, QuantizedMatrix):
        return quantized_grouped_matmul(rows, w, groups)
    if groups.uniform:
        experts, _, width = w.shape
        return jnp.einsum("ecd,edf->ecf", rows.reshape(experts, -1, rows.shape[-1]), w).reshape(-1, width)
    return _grouped_matmul(rows, w, groups)


def reference(rows: Float[Array, "R D"], w: Float[Array, "E D F"], groups: Groups) -> Float[Array, "R F"]:
    """The same in plain JAX, by gathering one matrix a row: for tests."""
    experts = jnp.repeat(groups.tile_experts(rows.shape[0] // groups.tile), groups.tile)
    return jnp.einsum("rd,rdf->rf", rows, w[experts])


@jax.custom_vjp
def _grouped_matmul(rows, w, groups):
    return product(rows, w, groups)


def _forward(rows, w, groups):
    return product(rows, w, groups), (rows, w, groups)


def _backward(saved, cotangent):
    rows, w, groups = saved
    rows_bar = product(cotangent, w, groups, transposed=True)
    w_bar = transpose_product(rows, cotangent, groups)
    return rows_bar, w_bar.astype(w.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def product(
    rows: Float[Array, "R D"], w: Float[Array, "E D F"], groups: Groups, *, transposed: bool = False
) -> Float[Array, "R F"]:
    """`grouped_matmul` on this platform, not differentiable; with `transposed` w is [E, F, D]."""
    if hopper.fits(groups, rows, w):
        return hopper.product(rows, w, groups, transposed=transposed)
    if triton.fits(groups, rows, w):
        return triton.product(rows, w, groups, transposed=transposed)
    return jax.lax.platform_dependent(
        rows,
        jnp.swapaxes(w, 1, 2) if transposed else w,
        groups,
        cpu=partial(_product_loop, at_once=TILES_AT_ONCE, all_tiles=False),
        cuda=partial(_product_loop, at_once=1, all_tiles=True),
        tpu=_product_ragged_dot,
    )


def transpose_product(
    rows: Float[Array, "R D"], cotangent: Float[Array, "R F"], groups: Groups
) -> Float[Array, "E D F"]:
    """rows_e^T @ cotangent_e over the rows of each expert: the gradient of its matrix.

    Summed in float32. The kernels for GPUs and TPUs round to the dtype of the rows, the former return it.
    """
    if hopper.fits(groups, rows, cotangent):
        return hopper.weight_gradient(rows, cotangent, groups)[0]
    if triton.fits(groups, rows, cotangent):
        return triton.transpose_product(rows, cotangent, groups)
    return jax.lax.platform_dependent(
        rows,
        cotangent,
        groups,
        cpu=partial(_transpose_loop, at_once=TILES_AT_ONCE, all_tiles=False),
        cuda=partial(_transpose_loop, at_once=1, all_tiles=True),
        tpu=_transpose_ragged_dot,
    )


def _product_loop(rows, w, groups, *, at_once, all_tiles):
    loop = TileLoop.over(groups, rows.shape[0], at_once=at_once, all_tiles=all_tiles)

    def body(i, out):
        return loop.put(out, multiply(loop.rows(rows, i), loop.matrices(w, i)), i)

    return loop.run(body, jnp.zeros_like(rows, shape=(rows.shape[0], w.shape[-1])))


def _transpose_loop(rows, cotangent, groups, *, at_once, all_tiles):
    loop = TileLoop.over(groups, rows.shape[0], at_once=at_once, all_tiles=all_tiles)
    columns = loop.columns(rows)

    def body(i, w_bar):
        return loop.add(w_bar, multiply_transposed(loop.take(columns, i), loop.rows(cotangent, i)), i)

    shape = (groups.group_sizes.shape[0], rows.shape[1], cotangent.shape[1])
    return loop.run(body, jnp.zeros_like(rows, shape=shape, dtype=jnp.float32))


def _product_ragged_dot(rows, w, groups):
    return jax.lax.ragged_dot(rows, w, groups.padded_sizes())


def _transpose_ragged_dot(rows, cotangent, groups):
    # Contracting over the ragged dimension: rows [R, D], cotangent [R, F] -> [E, D, F].
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    # The kernel sums in float32 whatever it writes; XLA would round what it writes wide in a pass of its own.
    w_bar = jax.lax.ragged_dot_general(
        rows, cotangent, groups.padded_sizes(), dimensions, preferred_element_type=rows.dtype
    )
    return w_bar.astype(jnp.float32)  # as on other platforms; goes away where it is rounded again
