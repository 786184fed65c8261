"""The gradient of the experts' matrices on Hopper: a product over the rows of each expert."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe.kernels.groups import Groups
from moe.kernels.hopper.gather import RowGather, mark_all_landed, mark_landed
from moe.kernels.hopper.pipeline import (
    DEPTH,
    LOADER_REGISTERS,
    MULTIPLIER_REGISTERS,
    MULTIPLIERS,
    Ring,
    Tiles,
    launch,
    staging_type,
    store,
)
from moe.kernels.hopper.tiling import tiles_for


def weight_gradient(
    x: Float[Array, "N D"],
    y_bar: Float[Array, "M F"],
    groups: Groups,
    *,
    matrices: int = 1,
    x_token: Int[Array, "R"] | None = None,
    y_token: Int[Array, "R"] | None = None,
    tiles: Tiles | None = None,
) -> list[Float[Array, "E D F"]]:
    """x_e^T y_bar_e over the rows of each expert; the sum in float32, the result in the dtype of x.

    Args:
        x: the rows.
        y_bar: their cotangents; zero for rows of padding.
        groups: layout of the rows.
        matrices: results, each of F / matrices columns, that lie side by side in `y_bar`.
        x_token: row of x for each row, where x does not hold the rows themselves.
        y_token: the same for y_bar.
        tiles: how an expert's matrix is cut.
    """
    experts, height, width = groups.group_sizes.shape[0], x.shape[1], y_bar.shape[1] // matrices
    tiles = tiles or tiles_for(
        "weight_gradient" if y_token is None else "weight_gradient, gathered columns", groups, height, width
    )
    grid = (pl.cdiv(height, tiles.rows), matrices * pl.cdiv(width, tiles.columns))
    per_matrix = grid[1] // matrices
    row_tile, strip = tiles.rows // MULTIPLIERS, min(tiles.strip, grid[1])
    rows = (x if x_token is None else y_bar).shape[0]
    tokens = [token for token in (x_token, y_token) if token is not None]
    gather = RowGather(DEPTH, tiles.rows if y_token is None else tiles.columns)
    if len(tokens) > 1:
        raise ValueError("the rows of one operand at most can be gathered")

    def body(order_ref, size_ref, start_ref, x_ref, y_ref, *refs):
        token_refs, outs, scratch = refs[: len(tokens)], refs[len(tokens) : -5], refs[-5:]
        ring, staging = Ring(*scratch[:4], stages=tiles.stages), scratch[4]
        warpgroup = lax.axis_index("warpgroup")
        items = (experts * grid[0] * grid[1],)

        def place(info):
            expert = order_ref[lax.div(info.index[0], jnp.int32(grid[0] * grid[1]))]
            within = lax.rem(info.index[0], jnp.int32(grid[0] * grid[1]))
            return expert, *plgpu.planar_snake(within, grid, 1, strip)

        def steps(expert):
            return lax.div(size_ref[expert] + (DEPTH - 1), jnp.int32(DEPTH))

        @pl.when(warpgroup == MULTIPLIERS)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            zero = jnp.int32(0)

            @plgpu.nd_loop(items, collective_axes="program", init_carry=(zero, zero))
            def last(info, carry):
                expert, row, column = place(info)
                start = start_ref[expert]
                matrix = lax.div(column, jnp.int32(per_matrix))
                x_at = row * tiles.rows
                y_at = matrix * width + (column - matrix * per_matrix) * tiles.columns

                def load(step, slot, carry):
                    k, full = pl.ds(start + step * DEPTH, DEPTH), ring.full.at[slot]
                    if x_token is None:
                        part = x_ref.at[k, pl.ds(x_at, tiles.rows)]
                        plgpu.copy_gmem_to_smem(part, ring.a.at[slot], full)
                    if y_token is None:
                        part = y_ref.at[k, pl.ds(y_at, tiles.columns)]
                        plgpu.copy_gmem_to_smem(part, ring.b.at[slot], full)
                    if not tokens:
                        return carry
                    mine, pending = carry
                    if y_token is None:
                        gather.start(x_ref, mine, x_at, ring.a.at[slot])
                    else:
                        gather.start(y_ref, mine, y_at, ring.b.at[slot])
                    return rows_of(step + 1), mark_landed(ring, slot, pending)

                def rows_of(step):  # one step ahead, so that the next one need not wait for them
                    last = rows - DEPTH
                    return gather.tokens(token_refs[0], lax.min(start + step * DEPTH, jnp.int32(last)))

                slot, pending = carry
                if not tokens:
                    return ring.fill(steps(expert), load, slot, pending)
                slot, (_, pending) = ring.fill(steps(expert), load, slot, (rows_of(0), pending))
                return slot, pending

            if tokens:
                mark_all_landed(ring, *last)

        @pl.when(warpgroup < MULTIPLIERS)
        def _multiply():
            plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
            ring.release_all()
            mine = pl.ds(warpgroup * row_tile, row_tile)

            @plgpu.nd_loop(items, collective_axes="program", init_carry=jnp.int32(0))
            def _tile(info, carry):
                expert, row, column = place(info)

                def with_sums(acc_ref):
                    def products(slot):
                        return [(acc_ref, ring.a.at[slot, :, mine].transpose((1, 0)), ring.b.at[slot])]

                    slot = ring.multiply(steps(expert), products, carry)
                    return acc_ref[...], slot

                acc, slot = pl.run_scoped(
                    with_sums, plgpu.WGMMAAccumulatorRef((row_tile, tiles.columns), jnp.float32)
                )
                rows = pl.ds(row * tiles.rows + warpgroup * row_tile, row_tile)
                for i, out in enumerate(outs):

                    @pl.when(lax.div(column, jnp.int32(per_matrix)) == i)
                    def _(i=i, out=out):
                        columns = pl.ds((column - i * per_matrix) * tiles.columns, tiles.columns)
                        store(acc, staging.at[warpgroup], out.at[expert, rows, columns])

                return slot

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    ring = Ring.scratch((DEPTH, tiles.rows), (DEPTH, tiles.columns), tiles.stages, 2, x.dtype)
    out_type = [jax.ShapeDtypeStruct((experts, height, width), x.dtype)] * matrices
    largest_first = jnp.argsort(-groups.group_sizes)  # lest one program ends with the longest contraction
    inputs = [largest_first, groups.group_sizes, groups.starts(), x, y_bar, *tokens]
    return launch(body, inputs, out_type, [*ring, staging_type(x.dtype)], "weight_gradient")
