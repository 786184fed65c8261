"""Grouped matrix products on any CUDA card from Ampere on: two Triton kernels, written in Pallas.

    product              y = x w         one program an output block, contracted in steps
    product, transposed  y = x w^T       the same kernel; w is read as it lies
    transpose_product    w_bar = x^T y   one program a block of an expert's matrix, a loop over its rows

For cards without Hopper's instructions, and for what its kernels do not take: float32, odd widths. The blocks
need no tuning: their 64 KiB of shared memory fit every such card.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from moe.kernels.groups import Groups

SMALLEST = 16  # side of a block that tensor cores take
AMPERE = 80  # compute capability that Triton asks for
STRIP = 8  # row blocks that take each block of columns in turn, while both are in the L2 cache


@dataclass(frozen=True)
class Blocks:
    """How a product is cut; every number a power of two."""

    rows: int = 128
    """Of an output block, at most; a tile holds a whole number of them."""

    columns: int = 128
    """Of an output block, at most."""

    depth_bytes: int = 64
    """Of the contraction in one step: 32 numbers of two bytes, 16 of four."""

    warps: int = 4
    """That share one output block."""

    stages: int = 4
    """Steps whose operands are in shared memory or on the way."""

    def depth(self, dtype: jnp.dtype) -> int:
        """Numbers of the contraction in one step."""
        return max(self.depth_bytes // jnp.dtype(dtype).itemsize, SMALLEST)


def present() -> bool:
    """Whether what is traced now will run on a card that these kernels compile for."""
    if not plgpu.is_gpu_device():
        return False
    try:
        return plgpu.get_gpu_info().compute_capability >= AMPERE
    except ValueError:  # a card that Pallas does not know
        return False


def fits(groups: Groups, *operands: Float[Array, "..."]) -> bool:
    """Whether the kernels take these, here: numbers of one type, in tiles that hold whole blocks.

    Args:
        groups: layout of the rows.
        operands: rows and matrices, of any width.
    """
    return (
        present()
        and {jnp.dtype(x.dtype).name for x in operands} in ({"bfloat16"}, {"float16"}, {"float32"})
        and groups.tile % SMALLEST == 0
        and not groups.uniform
    )


def product(
    rows: Float[Array, "R D"],
    w: Float[Array, "E D F"],
    groups: Groups,
    *,
    transposed: bool = False,
    blocks: Blocks = Blocks(),
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """rows[r] @ w[expert of r], summed in float32, in the dtype of `rows`; zeros behind the last group.

    Args:
        rows: bfloat16, float16, or float32, which is multiplied in TF32 unless
            `jax.default_matmul_precision` asks for more.
        w: the experts' matrices, of the same dtype.
        groups: layout of the rows; see `fits`.
        transposed: multiply by the transposed matrices: rows [R, F] give [R, D].
        blocks: how to cut.
        interpret: run as plain JAX, on any platform.
    """
    width, contracted = (w.shape[1], w.shape[2]) if transposed else (w.shape[2], w.shape[1])
    height = min(blocks.rows, _power_within(groups.tile))
    breadth = min(blocks.columns, _power_around(width))
    depth = min(blocks.depth(rows.dtype), _power_around(contracted))
    row_blocks, column_blocks = rows.shape[0] // height, pl.cdiv(width, breadth)
    tiles = rows.shape[0] // groups.tile

    def kernel(x_ref, w_ref, expert_ref, steps_ref, y_ref):
        row_block, column_block = _in_strips(pl.program_id(0), row_blocks, column_blocks)
        tile = lax.div(row_block, groups.tile // height)
        expert = expert_ref[tile]
        row = _Span(row_block * height, height, rows.shape[0])
        column = _Span(column_block * breadth, breadth, width)

        def step(i, total):
            inner = _Span(i * depth, depth, contracted)
            x = _load(x_ref, row, inner)
            if transposed:
                return total + plgpu.dot(x, _load(w_ref, column, inner, expert), trans_b=True)
            return total + plgpu.dot(x, _load(w_ref, inner, column, expert))

        # A tile behind the last group takes no step, and stores the zeros that it began with.
        total = lax.fori_loop(0, steps_ref[tile], step, jnp.zeros((height, breadth), jnp.float32))
        _store(y_ref, row, column, total)

    steps = jnp.where(jnp.arange(tiles) < groups.used_tiles(), pl.cdiv(contracted, depth), 0)
    return _call(
        kernel,
        (row_blocks * column_blocks,),
        (rows, w, groups.tile_experts(tiles), steps),
        (rows.shape[0], width),
        blocks,
        interpret=interpret,
        name="grouped_product",
    )


def transpose_product(
    rows: Float[Array, "R D"],
    cotangent: Float[Array, "R F"],
    groups: Groups,
    *,
    blocks: Blocks = Blocks(),
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """rows_e^T @ cotangent_e over each expert's rows, summed in float32, in the dtype of `rows`.

    Zeros for an expert without rows. Rows of padding count: they are finite, and their cotangent is zero.

    Args:
        rows: as in `product`.
        cotangent: of the same dtype.
        groups: layout of the rows; see `fits`.
        blocks: how to cut; the rows of an output block are those of a matrix here.
        interpret: run as plain JAX, on any platform.
    """
    experts, (count, matrix_rows), width = groups.group_sizes.shape[0], rows.shape, cotangent.shape[1]
    height = min(blocks.rows, _power_around(matrix_rows))
    breadth = min(blocks.columns, _power_around(width))
    depth = min(blocks.depth(rows.dtype), _power_within(groups.tile))

    def kernel(x_ref, y_ref, first_ref, last_ref, w_bar_ref):
        column = _Span(pl.program_id(0) * breadth, breadth, width)
        row = _Span(pl.program_id(1) * height, height, matrix_rows)
        expert = pl.program_id(2)

        def step(i, total):
            inner = _Span(i * depth, depth, count)
            x, y = _load(x_ref, inner, row), _load(y_ref, inner, column)
            return total + plgpu.dot(x, y, trans_a=True)

        total = jnp.zeros((height, breadth), jnp.float32)
        total = lax.fori_loop(first_ref[expert], last_ref[expert], step, total)
        _store(w_bar_ref, row, column, total, expert)

    first = groups.starts() // depth
    return _call(
        kernel,
        (pl.cdiv(width, breadth), pl.cdiv(matrix_rows, height), experts),
        (rows, cotangent, first, first + groups.padded_sizes() // depth),
        (experts, matrix_rows, width),
        blocks,
        interpret=interpret,
        name="grouped_transpose_product",
    )


@dataclass(frozen=True)
class _Span:
    """Places `start` to `start + size` of an axis that ends at `end`."""

    start: Array
    size: int
    end: int

    @property
    def places(self):
        return pl.ds(self.start, self.size)

    @property
    def inside(self) -> Array | None:
        """Whether each place is before the end; None where no block reaches over it."""
        if self.end % self.size == 0:
            return None
        return self.start + lax.iota(jnp.int32, self.size) < self.end


def _load(ref, row: _Span, column: _Span, *at) -> Array:
    """A block; zeros behind the ends."""
    part, mask = ref.at[(*at, row.places, column.places)], _mask(row, column)
    return plgpu.load(part) if mask is None else plgpu.load(part, mask=mask, other=0)


def _store(ref, row: _Span, column: _Span, block, *at) -> None:
    """Write a block; nothing behind the ends."""
    part = ref.at[(*at, row.places, column.places)]
    plgpu.store(part, block.astype(ref.dtype), mask=_mask(row, column))


def _mask(row: _Span, column: _Span) -> Array | None:
    """Which places of a block are inside; None where all are."""
    shape, mask = (row.size, column.size), None
    for axis, inside in enumerate((row.inside, column.inside)):
        if inside is not None:
            inside = lax.broadcast_in_dim(inside, shape, (axis,))
            mask = inside if mask is None else mask & inside
    return mask


def _in_strips(program, row_blocks: int, column_blocks: int):
    """The output block of a program: `STRIP` row blocks of one column block, then those of the next."""
    strip, place = lax.div(program, STRIP * column_blocks), lax.rem(program, STRIP * column_blocks)
    height = jnp.minimum(row_blocks - strip * STRIP, STRIP)
    return strip * STRIP + lax.rem(place, height), lax.div(place, height)


def _call(kernel: Callable, grid, inputs, shape, blocks: Blocks, *, interpret: bool, name: str):
    """Run the kernel. The result has the dtype of the rows, and varies over every axis that an input does."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in inputs))
    varying = jax.sharding.ManualAxisType(varying=axes)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, inputs[0].dtype, manual_axis_type=varying),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=name,
    )(*inputs)


def _power_within(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def _power_around(n: int) -> int:
    """The smallest power of two that holds n, at least `SMALLEST`."""
    return max(1 << (n - 1).bit_length(), SMALLEST)
