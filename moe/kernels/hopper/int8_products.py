"""Products of int8 rows with the int8 matrix of their expert, on Hopper (W8A8): what a prefill needs.

    int8_product    y = (x * x_scale) (w * w_scale)
    int8_swiglu     silu(x w_gate) * (x w_up), scaled alike

Sums are exact, in int32; scales come in the epilogue. Both operands lie with the contraction innermost, since
`wgmma` transposes no bytes: matrices are [E, F, D].
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int8

from moe.kernels.groups import Groups
from moe.kernels.hopper.pipeline import CHUNK, MULTIPLIERS, ROWS, Tiles, stage_depth, store_piece
from moe.kernels.hopper.row_products import sigmoid
from moe.kernels.hopper.rows_kernel import Share, rows_kernel

STAGE = stage_depth(jnp.int8)


def int8_product(
    x: Int8[Array, "R D"],
    x_scale: Float[Array, "R"],
    w: Int8[Array, "E F D"],
    w_scale: Float[Array, "E F"],
    groups: Groups,
    *,
    dtype=jnp.bfloat16,
    tiles: Tiles | None = None,
) -> Float[Array, "R F"]:
    """(x * x_scale) @ (w[expert] * w_scale[expert])^T.

    Args:
        x: rows grouped by expert.
        x_scale: of each row, float32.
        w: matrices, columns first.
        w_scale: of each of their columns, float32.
        groups: layout of the rows.
        dtype: of the result.
        tiles: how the product is cut.
    """
    _, width, depth = w.shape
    tiles = tiles or _tiles(groups, 256 if width % 256 == 0 else 128)

    def load_b(refs, expert, step, column, into, barrier):
        k, n = pl.ds(step * STAGE, STAGE), pl.ds(column * tiles.columns, tiles.columns)
        plgpu.copy_gmem_to_smem(refs[0].at[expert, n, k], into.at[0], barrier)

    def epilogue(acc, refs, outs, staging, share, expert, row, column, ring, slot):
        row_scale = _of_rows(refs[1], share, row)
        first = column * tiles.columns + share.first_column
        for turn, i in enumerate(range(0, share.columns, CHUNK)):
            columns = pl.ds(first + i, CHUNK)
            y = (
                acc[:, i : i + CHUNK].astype(jnp.float32)
                * row_scale
                * _of_columns(refs[2], expert, columns, share)
            )
            store_piece(y, staging, outs[0].at[share.rows_at(row), columns], turn)
        return slot

    (y,) = rows_kernel(
        "int8_product",
        x,
        None,
        [w, x_scale, w_scale],
        groups,
        tiles,
        widths=[width],
        depth=depth,
        column_tiles=pl.cdiv(width, tiles.columns),
        transposed=True,
        load_b=load_b,
        epilogue=epilogue,
        dtype=dtype,
    )
    return y


def int8_swiglu(
    x: Int8[Array, "N D"],
    x_scale: Float[Array, "R"],
    w_gate: Int8[Array, "E F D"],
    w_up: Int8[Array, "E F D"],
    scales: tuple[Float[Array, "E F"], Float[Array, "E F"]],
    groups: Groups,
    *,
    token: Int[Array, "R"] | None = None,
    dtype=jnp.bfloat16,
    tiles: Tiles | None = None,
) -> Float[Array, "R F"]:
    """silu(x w_gate) * (x w_up) of the scaled numbers; for the arguments see `int8_product`.

    With `token` the rows are x[token], read row by row; `x_scale` is of these rows all the same.
    """
    _, width, depth = w_gate.shape
    tiles = tiles or _tiles(groups, 256)
    half = tiles.columns // 2

    def load_b(refs, expert, step, column, into, barrier):
        k, n = pl.ds(step * STAGE, STAGE), pl.ds(column * half, half)
        for i, w in enumerate(refs[:2]):
            plgpu.copy_gmem_to_smem(w.at[expert, n, k], into.at[i], barrier)

    def epilogue(acc, refs, outs, staging, share, expert, row, column, ring, slot):
        mine, row_scale = share.columns // 2, _of_rows(refs[2], share, row)
        first = column * half + share.first_column // 2
        for turn, i in enumerate(range(0, mine, CHUNK)):
            columns = pl.ds(first + i, CHUNK)
            gate, up = (
                acc[:, at + i : at + i + CHUNK].astype(jnp.float32)
                * row_scale
                * _of_columns(ref, expert, columns, share)
                for at, ref in ((0, refs[3]), (mine, refs[4]))
            )
            store_piece(gate * sigmoid(gate) * up, staging, outs[0].at[share.rows_at(row), columns], turn)
        return slot

    (hidden,) = rows_kernel(
        "int8_swiglu",
        x,
        token,
        [w_gate, w_up, x_scale, *scales],
        groups,
        tiles,
        widths=[width],
        depth=depth,
        column_tiles=width // half,
        transposed=True,
        copies_of_b=2,
        load_b=load_b,
        epilogue=epilogue,
        dtype=dtype,
    )
    return hidden


def _tiles(groups: Groups, columns: int) -> Tiles:
    by_rows = MULTIPLIERS * ROWS
    return Tiles(by_rows if groups.tile % by_rows == 0 else ROWS, columns)


def _of_rows(ref, share: Share, row):
    """The scales of a multiplier's rows, for one piece of its sums."""
    scale = plgpu.load(ref.at[share.rows_at(row)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(scale, (share.rows, CHUNK), [0])


def _of_columns(ref, expert, columns, share: Share):
    """The scales of a piece's columns."""
    scale = plgpu.load(ref.at[expert, columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(scale, (share.rows, CHUNK), [1])
