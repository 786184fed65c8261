"""The kernel behind all products of rows with the matrix of their expert."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe.kernels.groups import Groups
from moe.kernels.hopper.gather import RowGather, see_copies
from moe.kernels.hopper.pipeline import (
    LOADER_REGISTERS,
    MULTIPLIER_REGISTERS,
    MULTIPLIERS,
    ROWS,
    Ring,
    Tiles,
    launch,
    stage_depth,
    staging_type,
)


@dataclass(frozen=True)
class Share:
    """A multiplier's part of an output tile: half of its rows, or half of its columns where rows are few."""

    tiles: Tiles
    warpgroup: Any

    @property
    def by_rows(self) -> bool:
        """Whether rows are shared, not columns."""
        return self.tiles.rows >= MULTIPLIERS * ROWS

    @property
    def rows(self) -> int:
        """How many."""
        return self.tiles.rows // MULTIPLIERS if self.by_rows else self.tiles.rows

    @property
    def columns(self) -> int:
        """How many."""
        return self.tiles.columns if self.by_rows else self.tiles.columns // MULTIPLIERS

    @property
    def first_row(self):
        """Within the tile."""
        return self.warpgroup * self.rows if self.by_rows else 0

    @property
    def first_column(self):
        """Within the tile."""
        return 0 if self.by_rows else self.warpgroup * self.columns

    def rows_at(self, row):
        """Among all rows, of row tile `row`."""
        return pl.ds(row * self.tiles.rows + self.first_row, self.rows)


def rows_kernel(
    name: str,
    x: Float[Array, "N D"],
    token: Int[Array, "R"] | None,
    others: list,
    groups: Groups,
    tiles: Tiles,
    *,
    widths: list[int],
    depth: int,
    column_tiles: int,
    transposed: bool,
    load_b: Callable,
    epilogue: Callable,
    copies_of_b: int = 1,
    partial_sums: jax.ShapeDtypeStruct | None = None,
    extra_steps: int = 0,
    load_extra: Callable | None = None,
    dtype: Any = None,
) -> list[Array]:
    """Multiply the rows of each expert by its matrix and hand the sums to `epilogue`.

    Args:
        name: of the kernel.
        x: the rows, or with `token` what they are gathered from.
        token: row of x for each row.
        others: arrays that the functions below get as references.
        groups: layout of the rows.
        tiles: how the product is cut.
        widths: of the results, whose rows are these rows.
        depth: length of the contraction.
        column_tiles: output tiles of one row tile.
        transposed: the second operand lies [columns, depth].
        load_b: starts the copies of the second operand of one step.
        epilogue: stores a multiplier's share of an output tile; gives the ring's next slot.
        copies_of_b: that `load_b` starts, each of as many columns.
        partial_sums: one more result.
        extra_steps: stages that follow the product's, read by the epilogue.
        load_extra: starts the two copies of such a stage.
        dtype: of the results; None is that of x. Rows of int8 are multiplied in int32.
    """
    rows = x.shape[0] if token is None else token.shape[0]
    if groups.tile % tiles.rows:
        raise ValueError(f"tiles of {tiles.rows} rows do not divide groups padded to {groups.tile}")
    per_group_tile = groups.tile // tiles.rows
    stage, part, dtype = stage_depth(x.dtype), tiles.columns // copies_of_b, dtype or x.dtype
    steps, sums_in = pl.cdiv(depth, stage), jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    gather = RowGather(tiles.rows, stage, x.dtype.itemsize)
    out_type = [jax.ShapeDtypeStruct((rows, width), dtype) for width in widths]
    out_type += [] if partial_sums is None else [partial_sums]

    def body(expert_ref, used_ref, *refs):
        refs, outs, scratch = refs[: -len(out_type) - 5], refs[-len(out_type) - 5 : -5], refs[-5:]
        ring, staging = Ring(*scratch[:4], stages=tiles.stages), scratch[4]
        on_full = None if token is None else see_copies
        token_ref, x_ref, *other_refs = refs if token is not None else (None, *refs)
        warpgroup = lax.axis_index("warpgroup")
        used = used_ref[0] * per_group_tile
        items = (used * column_tiles,)

        def place(info):
            return tiles.place(info.index[0], used, column_tiles)

        @pl.when(warpgroup == MULTIPLIERS)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            @plgpu.nd_loop(items, collective_axes="program", init_carry=jnp.int32(0))
            def _tile(info, carry):
                row, column = place(info)
                expert = expert_ref[lax.div(row, jnp.int32(per_group_tile))]
                mine = pl.ds(row * tiles.rows, tiles.rows)
                tokens = None if token is None else gather.tokens(token_ref, row * tiles.rows)

                def load(step, slot, _):
                    full = ring.full.at[slot]
                    load_b(other_refs, expert, step, column, ring.b.at[slot], full)
                    if token is not None:
                        gather.start(x_ref, tokens, step * stage, ring.a.at[slot], full)
                    else:
                        k = pl.ds(step * stage, stage)
                        plgpu.copy_gmem_to_smem(x_ref.at[mine, k], ring.a.at[slot], full)

                slot, _ = ring.fill(steps, load, carry)
                load_more = load_extra
                if load_more is None:
                    return slot

                def extra(step, slot, _):
                    a, b, full = ring.a.at[slot], ring.b.at[slot], ring.full.at[slot]
                    load_more(other_refs, step, mine, column, a, b, full)

                return ring.fill(extra_steps, extra, slot)[0]

        @pl.when(warpgroup < MULTIPLIERS)
        def _multiply():
            plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
            ring.release_all()
            share = Share(tiles, warpgroup)
            my_rows, my_part = pl.ds(share.first_row, share.rows), share.columns // copies_of_b
            my_columns = pl.ds(share.first_column // copies_of_b, my_part)

            @plgpu.nd_loop(items, collective_axes="program", init_carry=jnp.int32(0))
            def _tile(info, carry):
                row, column = place(info)

                def b_of(slot, i):
                    if transposed:
                        return ring.b.at[slot, i, my_columns].transpose((1, 0))
                    return ring.b.at[slot, i, :, my_columns]

                def with_sums(acc_ref):
                    def products(slot):
                        a = ring.a.at[slot, my_rows]
                        if copies_of_b == 1:
                            sums = [acc_ref]
                        else:
                            sums = [acc_ref.at[:, pl.ds(i * my_part, my_part)] for i in range(copies_of_b)]
                        return [(to, a, b_of(slot, i)) for i, to in enumerate(sums)]

                    slot = ring.multiply(steps, products, carry, on_full)
                    return acc_ref[...], slot

                acc, slot = pl.run_scoped(
                    with_sums, plgpu.WGMMAAccumulatorRef((share.rows, share.columns), sums_in)
                )
                expert = expert_ref[lax.div(row, jnp.int32(per_group_tile))]
                piece = staging.at[warpgroup]
                return epilogue(acc, other_refs, outs, piece, share, expert, row, column, ring, slot)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    b_shape = (copies_of_b, part, stage) if transposed else (copies_of_b, stage, part)
    ring = Ring.scratch((tiles.rows, stage), b_shape, tiles.stages, 1 + copies_of_b, x.dtype)
    inputs = [groups.tile_experts(rows // groups.tile), groups.used_tiles()[None]]
    inputs += [x, *others] if token is None else [token, x, *others]
    return launch(body, inputs, out_type, [*ring, staging_type(dtype)], name)
