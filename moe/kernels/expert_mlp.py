"""The experts' SwiGLU feed-forward over rows grouped by expert, as one operation.

CPU        one loop over row tiles forward and one backward, of one iteration where the matrices are small
GPU, TPU   three grouped products forward and six backward

With quantised or observed matrices it is three grouped products everywhere, but of int8 rows on Hopper
the first two are one kernel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.kernels.grouped_matmul import grouped_matmul, product, transpose_product
from moe.kernels.groups import Groups
from moe.kernels.int8_rows import int8_rows_fit, int8_rows_mlp
from moe.kernels.observe import ObservedMatrix, observed_grouped_matmul
from moe.kernels.tiles import (
    TileLoop,
    largest_divisor,
    multiply,
    multiply_by_transposed,
    multiply_transposed,
    transposed,
)
from moe.quant.matrix import QuantizedMatrix

# What one iteration of the CPU loop takes together: so many bytes of the tiles' matrices, which it copies,
# and so many tiles, since the last iteration computes tiles that may be empty.
MATRIX_BYTES_AT_ONCE, MOST_TILES_AT_ONCE = 2**25, 128

NotPlain = QuantizedMatrix | ObservedMatrix


def expert_mlp(
    rows: Float[Array, "R D"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    groups: Groups,
) -> Float[Array, "R D"]:
    """(silu(x w_gate) * (x w_up)) w_down with each row's expert (SwiGLU, 2002.05202 eq. 5).

    Differentiable in all four arrays; backward keeps the two [R, F] pre-activations. What holds for rows of
    padding is said at `grouped_matmul`.
    """
    if int8_rows_fit(groups, rows, w_gate, w_up, w_down):
        return int8_rows_mlp(rows, w_gate, w_up, w_down, groups)
    if groups.uniform or any(isinstance(w, NotPlain) for w in (w_gate, w_up, w_down)):
        return reference(rows, w_gate, w_up, w_down, groups)
    return _expert_mlp(rows, w_gate, w_up, w_down, groups)


def reference(rows, w_gate, w_up, w_down, groups) -> Float[Array, "R D"]:
    """The same from three differentiable grouped products."""

    def times(rows, w):
        if isinstance(w, ObservedMatrix):
            return observed_grouped_matmul(rows, w, groups)
        return grouped_matmul(rows, w, groups)

    return times(swiglu(times(rows, w_gate), times(rows, w_up)), w_down)


def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def _expert_mlp(rows, w_gate, w_up, w_down, groups):
    return _forward(rows, w_gate, w_up, w_down, groups)[0]


def _forward(rows, w_gate, w_up, w_down, groups):
    inputs = (rows, w_gate, w_up, w_down, groups)
    y, gate, up = jax.lax.platform_dependent(
        *inputs, cpu=_forward_fused, cuda=_forward_composed, tpu=_forward_composed
    )
    return y, (*inputs, gate, up)


def _backward(saved, y_bar):
    def rounded(backward):  # here, since the sums of some platforms are wide and of others are not
        def all_four(*inputs):
            return tuple(bar.astype(x.dtype) for bar, x in zip(backward(*inputs), inputs[:4], strict=True))

        return all_four

    fused, composed = rounded(_backward_fused), rounded(_backward_composed)
    return *jax.lax.platform_dependent(*saved, y_bar, cpu=fused, cuda=composed, tpu=composed), None


_expert_mlp.defvjp(_forward, _backward)


def _forward_composed(rows, w_gate, w_up, w_down, groups):
    gate, up = product(rows, w_gate, groups), product(rows, w_up, groups)
    return product(swiglu(gate, up), w_down, groups), gate, up


def _backward_composed(rows, w_gate, w_up, w_down, groups, gate, up, y_bar):
    hidden, swiglu_vjp = jax.vjp(swiglu, gate, up)
    gate_bar, up_bar = swiglu_vjp(product(y_bar, w_down, groups, transposed=True))
    rows_bar = product(gate_bar, w_gate, groups, transposed=True)
    rows_bar += product(up_bar, w_up, groups, transposed=True)
    w_gate_bar, w_up_bar = (transpose_product(rows, bar, groups) for bar in (gate_bar, up_bar))
    return rows_bar, w_gate_bar, w_up_bar, transpose_product(hidden, y_bar, groups)


def _forward_fused(rows, w_gate, w_up, w_down, groups):
    loop, w_in = _loop_and_w_in(rows, w_gate, w_up, groups)

    def body(i, outputs):
        gate, up = jnp.split(multiply(loop.rows(rows, i), loop.matrices(w_in, i)), 2, axis=-1)
        y = multiply(swiglu(gate, up), loop.matrices(w_down, i))
        return tuple(loop.put(out, tiles, i) for out, tiles in zip(outputs, (y, gate, up), strict=True))

    hidden = jnp.zeros_like(rows, shape=(rows.shape[0], w_gate.shape[-1]))
    return loop.run(body, (jnp.zeros_like(rows), hidden, hidden))


def _backward_fused(rows, w_gate, w_up, w_down, groups, gate, up, y_bar):
    loop, w_in = _loop_and_w_in(rows, w_gate, w_up, groups)

    def body(i, outputs):
        rows_bar, w_in_bar, w_down_bar = outputs
        x, tile_bar = loop.rows(rows, i), loop.rows(y_bar, i)
        hidden, swiglu_vjp = jax.vjp(swiglu, loop.rows(gate, i), loop.rows(up, i))
        hidden_bar = multiply_by_transposed(tile_bar, loop.matrices(w_down, i))
        inner_bar = jnp.concatenate(swiglu_vjp(hidden_bar), axis=-1)
        x_bar = multiply_by_transposed(inner_bar, loop.matrices(w_in, i))
        return (
            loop.put(rows_bar, x_bar, i),
            loop.add(w_in_bar, multiply_transposed(transposed(x), inner_bar), i),
            loop.add(w_down_bar, multiply_transposed(transposed(hidden), tile_bar), i),
        )

    totals = (jnp.zeros_like(rows, shape=w.shape, dtype=jnp.float32) for w in (w_in, w_down))
    rows_bar, w_in_bar, w_down_bar = loop.run(body, (jnp.zeros_like(rows), *totals))
    return rows_bar, *jnp.split(w_in_bar, 2, axis=-1), w_down_bar


def _loop_and_w_in(rows, w_gate, w_up, groups):
    """The CPU's loop, and both inward matrices as one: one product instead of two."""
    w_in = jnp.concatenate([w_gate, w_up], axis=-1)
    fitting = MATRIX_BYTES_AT_ONCE * w_in.shape[0] // (w_in.size * w_in.dtype.itemsize)
    at_once = largest_divisor(rows.shape[0] // groups.tile, most=min(fitting, MOST_TILES_AT_ONCE))
    return TileLoop.over(groups, rows.shape[0], at_once=at_once), w_in
