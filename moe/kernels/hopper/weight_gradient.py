"""The gradient of the experts' matrices on Hopper: a product over the rows of each expert."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe.kernels.groups import Groups
from moe.kernels.hopper.gather import RowGather, see_copies
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
    row_tile = tiles.rows // MULTIPLIERS
    rows = (x if x_token is None else y_bar).shape[0]
    tokens = [token for token in (x_token, y_token) if token is not None]
    gather = RowGather(DEPTH, tiles.rows if y_token is None else tiles.columns, x.dtype.itemsize)
    if len(tokens) > 1:
        raise ValueError("the rows of one operand at most can be gathered")

    def body(order_ref, size_ref, start_ref, x_ref, y_ref, *refs):
        token_refs, outs, scratch = refs[: len(tokens)], refs[len(tokens) : -5], refs[-5:]
        ring, staging = Ring(*scratch[:4], stages=tiles.stages), scratch[4]
        on_full = see_copies if tokens else None
        warpgroup = lax.axis_index("warpgroup")
        items = (experts * grid[0] * grid[1],)

        def place(info):
            expert = order_ref[lax.div(info.index[0], jnp.int32(grid[0] * grid[1]))]
            within = lax.rem(info.index[0], jnp.int32(grid[0] * grid[1]))
            return expert, *tiles.place(within, *grid)

        def steps(expert):
            return lax.div(size_ref[expert] + (DEPTH - 1), jnp.int32(DEPTH))

        @pl.when(warpgroup == MULTIPLIERS)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            @plgpu.nd_loop(items, collective_axes="program", init_carry=jnp.int32(0))
            def _tile(info, carry):
                expert, row, column = place(info)
                start = start_ref[expert]
                matrix = lax.div(column, jnp.int32(per_matrix))
                x_at = row * tiles.rows
                y_at = matrix * width + (column - matrix * per_matrix) * tiles.columns

                def tokens_of(step):
                    last = rows - DEPTH
                    return gather.tokens(token_refs[0], lax.min(start + step * DEPTH, jnp.int32(last)))

                def load(step, slot, mine):
                    k, full = pl.ds(start + step * DEPTH, DEPTH), ring.full.at[slot]
                    if x_token is None:
                        part = x_ref.at[k, pl.ds(x_at, tiles.rows)]
                        plgpu.copy_gmem_to_smem(part, ring.a.at[slot], full)
                    else:
                        gather.start(x_ref, mine, x_at, ring.a.at[slot], full)
                    if y_token is None:
                        part = y_ref.at[k, pl.ds(y_at, tiles.columns)]
                        plgpu.copy_gmem_to_smem(part, ring.b.at[slot], full)
                    else:
                        gather.start(y_ref, mine, y_at, ring.b.at[slot], full)
                    # One step ahead, so that the next one need not wait for them.
                    return tokens_of(step + 1) if tokens else None

                return ring.fill(steps(expert), load, carry, tokens_of(0) if tokens else None)[0]

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

                    slot = ring.multiply(steps(expert), products, carry, on_full)
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
