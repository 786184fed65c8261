"""Where the rows of few assignments lie, found by one small kernel on any CUDA card: Triton, in Pallas.

XLA makes ten kernels of it, one after the other, which is long beside the experts of a decode step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from moe.kernels import grouped_matmul_triton as triton
from moe.kernels.groups import Groups, TileExperts

AT_ONCE = 64  # assignments or tiles that the program's threads look at together
CLEARED = 1024  # rows that it clears at once
MOST = 128  # assignments: one program goes through all of them, which beats XLA's ten kernels for no more


class RowLayout(NamedTuple):
    """Rows grouped by expert, each group padded to whole tiles."""

    row: Int[Array, "A"]
    """Of each assignment; R where it has none."""

    assignment: Int[Array, "R"]
    """Of each row; A where it is padding."""

    groups: Groups


def fits(assignments: int) -> bool:
    """Whether the kernel takes so many, here."""
    return triton.present() and assignments <= MOST


def lay_out(
    expert: Int[Array, "A"], experts: int, tile: int, rows: int, *, interpret: bool = False
) -> RowLayout:
    """The rows of each assignment, those of an expert in the order of the assignments.

    Args:
        expert: of each assignment; one that is not among the first `experts` has no row.
        experts: E.
        tile: rows in which groups are padded.
        rows: R, a multiple of `tile`.
        interpret: run as plain JAX, on any platform.
    """
    count, tiles, lanes = expert.shape[0], rows // tile, 1 << max(experts - 1, 15).bit_length()
    axes = jax.sharding.ManualAxisType(varying=jax.typeof(expert).mat.varying)
    lengths = count, rows, experts, tiles, 1, count

    def kernel(expert_ref, row_ref, assignment_ref, sizes_ref, tile_expert_ref, used_ref, rank_ref):
        number = lax.iota(jnp.int32, lanes)

        def span(i, end):
            at = i * AT_ONCE + lax.iota(jnp.int32, AT_ONCE)
            return at, at < end

        def chosen(i):
            at, inside = span(i, count)
            expert = plgpu.load(expert_ref.at[at], mask=inside, other=-1)
            here = inside & (expert >= 0) & (expert < experts)
            return at, inside, here, jnp.where(here, expert, lanes)

        def own(expert, numbers):
            return jnp.sum(jnp.where(expert[:, None] == number[None], numbers[None], 0), axis=1)

        def queue(i, sizes):
            at, inside, _, expert = chosen(i)
            _, _, _, other = chosen(i)
            earlier = (expert[:, None] == other[None]) & (at[None] < at[:, None])
            rank = own(expert, sizes) + jnp.sum(earlier.astype(jnp.int32), axis=1)
            plgpu.store(rank_ref.at[at], rank, mask=inside)
            return sizes + jnp.sum((expert[:, None] == number[None]).astype(jnp.int32), axis=0)

        def clear(i, carry):
            at = i * CLEARED + lax.iota(jnp.int32, CLEARED)
            plgpu.store(assignment_ref.at[at], jnp.full((CLEARED,), count, jnp.int32), mask=at < rows)
            return carry

        sizes = lax.fori_loop(0, pl.cdiv(count, AT_ONCE), queue, jnp.zeros((lanes,), jnp.int32))
        lax.fori_loop(0, pl.cdiv(rows, CLEARED), clear, 0)
        plgpu.store(sizes_ref.at[number], sizes, mask=number < experts)
        own_tiles = lax.div(sizes + tile - 1, tile)
        ends = jnp.cumsum(own_tiles)
        used_ref[0] = jnp.sum(own_tiles)
        if not interpret:
            plgpu.debug_barrier()  # what some threads have written, others read

        def place(i, carry):
            at, inside, here, expert = chosen(i)
            rank = plgpu.load(rank_ref.at[at], mask=inside, other=0)
            row = jnp.where(here, own(expert, (ends - own_tiles) * tile) + rank, rows)
            plgpu.store(row_ref.at[at], row, mask=inside)
            plgpu.store(assignment_ref.at[row], at, mask=here & (row < rows))
            return carry

        def name(i, carry):
            at, inside = span(i, tiles)
            before = (ends[None] <= at[:, None]) & (number[None] < experts)
            expert = jnp.minimum(jnp.sum(before.astype(jnp.int32), axis=1), experts - 1)
            plgpu.store(tile_expert_ref.at[at], expert, mask=inside)
            return carry

        lax.fori_loop(0, pl.cdiv(count, AT_ONCE), place, 0)
        lax.fori_loop(0, pl.cdiv(tiles, AT_ONCE), name, 0)

    row, assignment, sizes, tile_expert, used, _ = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((n,), jnp.int32, manual_axis_type=axes) for n in lengths],
        grid=(1,),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="row_layout",
    )(expert)
    return RowLayout(row, assignment, Groups(sizes, tile, tiles=TileExperts(tile_expert, used)))
