"""Products of rows with the matrix of their expert, on Hopper: one kernel, four uses.

    product             y = x w                      [R, D] [E, D, F] -> [R, F], or x w^T, [R, F] -> [R, D]
    swiglu_product      silu(x w_gate) * (x w_up)    both products in one accumulator
    swiglu_backward     y_bar w_down^T               and the derivative of SwiGLU in its epilogue
    inward_transposed   h_bar [w_gate w_up]^T        both products in one contraction

Where `token` is given, the rows of the first operand are x[token], read row by row and never written down.
`h` is [R, 2 F]: what enters SwiGLU, gate first.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from moe.kernels.groups import Groups
from moe.kernels.hopper.pipeline import CHUNK, DEPTH, Tiles, store, store_piece
from moe.kernels.hopper.rows_kernel import Share, rows_kernel
from moe.kernels.hopper.tiling import tiles_for


def product(
    x: Float[Array, "N D"],
    w: Float[Array, "E D F"],
    groups: Groups,
    *,
    transposed: bool = False,
    token: Int[Array, "R"] | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "R F"]:
    """x @ w[expert], or x @ w[expert]^T."""
    depth, width = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    tiles = tiles or tiles_for("product", groups, depth, width)

    def load_b(refs, expert, step, column, into, barrier):
        k, n = pl.ds(step * DEPTH, DEPTH), pl.ds(column * tiles.columns, tiles.columns)
        part = refs[0].at[expert, n, k] if transposed else refs[0].at[expert, k, n]
        plgpu.copy_gmem_to_smem(part, into.at[0], barrier)

    (y,) = rows_kernel(
        "grouped_product",
        x,
        token,
        [w],
        groups,
        tiles,
        widths=[width],
        depth=depth,
        column_tiles=pl.cdiv(width, tiles.columns),
        transposed=transposed,
        load_b=load_b,
        epilogue=_store_sums,
    )
    return y


def inward_transposed(
    h_bar: Float[Array, "R G"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    groups: Groups,
    *,
    tiles: Tiles | None = None,
) -> Float[Array, "R D"]:
    """h_bar [w_gate w_up]^T: the gradient of the rows."""
    _, width, inner = w_gate.shape
    tiles = tiles or tiles_for("inward_transposed", groups, 2 * inner, width)
    half = inner // DEPTH

    def load_b(refs, expert, step, column, into, barrier):
        n = pl.ds(column * tiles.columns, tiles.columns)
        for i, w in enumerate(refs):

            @pl.when((step >= half) if i else (step < half))
            def _(i=i, w=w):
                k = pl.ds((step - i * half) * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(w.at[expert, n, k], into.at[0], barrier)

    (rows_bar,) = rows_kernel(
        "inward_transposed",
        h_bar,
        None,
        [w_gate, w_up],
        groups,
        tiles,
        widths=[width],
        depth=2 * inner,
        column_tiles=pl.cdiv(width, tiles.columns),
        transposed=True,
        load_b=load_b,
        epilogue=_store_sums,
    )
    return rows_bar


def swiglu_product(
    x: Float[Array, "N D"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    groups: Groups,
    *,
    token: Int[Array, "R"] | None = None,
    keep: bool = True,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "R F"], Float[Array, "R G"] | None]:
    """silu(x w_gate) * (x w_up), and h if it is to be kept. A tile holds as many columns of each product."""
    _, depth, width = w_gate.shape
    tiles = tiles or tiles_for("swiglu_product", groups, depth, width)
    half = tiles.columns // 2

    def load_b(refs, expert, step, column, into, barrier):
        k, n = pl.ds(step * DEPTH, DEPTH), pl.ds(column * half, half)
        for i, w in enumerate(refs):
            plgpu.copy_gmem_to_smem(w.at[expert, k, n], into.at[i], barrier)

    def epilogue(acc, refs, outs, staging, share, expert, row, column, ring, slot):
        mine = share.columns // 2
        first = column * half + share.first_column // 2
        turn = 0
        for i in range(0, mine, CHUNK):
            gate, up = acc[:, i : i + CHUNK], acc[:, mine + i : mine + i + CHUNK]
            parts = [(gate * sigmoid(gate) * up, outs[0], first + i)]
            if keep:
                parts += [(gate, outs[1], first + i), (up, outs[1], width + first + i)]
            for values, out, at in parts:
                store_piece(values, staging, out.at[share.rows_at(row), pl.ds(at, CHUNK)], turn)
                turn += 1
        return slot

    results = rows_kernel(
        "swiglu_product",
        x,
        token,
        [w_gate, w_up],
        groups,
        tiles,
        widths=[width, 2 * width][: 1 + keep],
        depth=depth,
        column_tiles=width // half,
        transposed=False,
        copies_of_b=2,
        load_b=load_b,
        epilogue=epilogue,
    )
    return (results[0], results[1]) if keep else (results[0], None)


def swiglu_backward(
    y_bar: Float[Array, "N D"],
    w_down: Float[Array, "E F D"],
    h: Float[Array, "R G"],
    weight: Float[Array, "R"],
    groups: Groups,
    *,
    token: Int[Array, "R"] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "R G"], Float[Array, "R F"], Float[Array, "R"]]:
    """From the cotangent of the weighted output to those of h and of the weights, and what w_down's needs.

    The weights' gradient is taken between SwiGLU and w_down, so that no expert's output is needed.

    Args:
        y_bar: cotangent of the sums of weighted expert outputs.
        w_down: second matrix of the experts.
        h: from `swiglu_product`.
        weight: combine weight of each row, float32, zero for rows of padding.
        groups: layout of the rows.
        token: row of y_bar for each row.
        tiles: how the product is cut.

    Returns:
        The cotangent of h; weight * silu(gate) * up; and the cotangent of the weights, float32.
    """
    rows, width, depth = h.shape[0], h.shape[1] // 2, w_down.shape[2]
    tiles = tiles or tiles_for("swiglu_backward", groups, depth, width)
    if not Share(tiles, 0).by_rows:
        return _swiglu_backward_unfused(y_bar, w_down, h, weight, groups, token)
    columns, column_tiles = tiles.columns, width // tiles.columns

    def load_b(refs, expert, step, column, into, barrier):
        k, n = pl.ds(step * DEPTH, DEPTH), pl.ds(column * columns, columns)
        plgpu.copy_gmem_to_smem(refs[0].at[expert, n, k], into.at[0], barrier)

    def load_extra(refs, step, row, column, a, b, barrier):
        gate = column * columns + step * CHUNK
        plgpu.copy_gmem_to_smem(refs[1].at[row, pl.ds(gate, CHUNK)], a, barrier)
        up = refs[1].at[row, pl.ds(width + gate, CHUNK)]
        plgpu.copy_gmem_to_smem(up, b.at[0, pl.ds(0, tiles.rows)], barrier)

    def epilogue(acc, refs, outs, staging, share, expert, row, column, ring, slot):
        h_bar, weighted, weight_bar = outs
        at_row = share.rows_at(row)
        s = plgpu.load(refs[2].at[at_row], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        s = lax.broadcast_in_dim(s, (share.rows, CHUNK), [0])
        total = plgpu.layout_cast(jnp.zeros((share.rows,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        mine = pl.ds(share.first_row, share.rows)
        for i in range(0, columns, CHUNK):
            plgpu.barrier_wait(ring.full.at[slot])
            gate = ring.a.at[slot, mine][...].astype(jnp.float32)
            up = ring.b.at[slot, 0, mine][...].astype(jnp.float32)
            plgpu.barrier_arrive(ring.empty.at[slot])
            slot = ring.next(slot)
            hidden_bar = acc[:, i : i + CHUNK]
            slope = sigmoid(gate)
            silu = gate * slope
            total += jnp.sum(hidden_bar * (silu * up), axis=1)
            inner_bar = s * hidden_bar
            gate_bar = inner_bar * up * (slope + silu * (1 - slope))
            at = column * columns + i
            parts = [
                (gate_bar, h_bar, at),
                (inner_bar * silu, h_bar, width + at),
                (s * silu * up, weighted, at),
            ]
            for turn, (values, out, first) in enumerate(parts, start=3 * (i // CHUNK)):
                store_piece(values, staging, out.at[at_row, pl.ds(first, CHUNK)], turn)
        weight_bar.at[column, at_row][...] = total
        return slot

    h_bar, weighted, weight_bar = rows_kernel(
        "swiglu_backward",
        y_bar,
        token,
        [w_down, h, weight],
        groups,
        tiles,
        widths=[2 * width, width],
        partial_sums=jax.ShapeDtypeStruct((column_tiles, rows), jnp.float32),
        depth=depth,
        column_tiles=column_tiles,
        transposed=True,
        load_b=load_b,
        epilogue=epilogue,
        extra_steps=columns // CHUNK,
        load_extra=load_extra,
    )
    return h_bar, weighted, weight_bar.sum(0)


def _swiglu_backward_unfused(y_bar, w_down, h, weight, groups, token):
    """The same with the derivative by itself, for tiles too small to be shared by rows."""
    hidden_bar = product(y_bar, w_down, groups, transposed=True, token=token).astype(jnp.float32)
    hidden, pullback = jax.vjp(swiglu, *jnp.split(h.astype(jnp.float32), 2, axis=1))
    scale = weight[:, None]
    h_bar = jnp.concatenate(pullback(scale * hidden_bar), axis=1)
    return h_bar.astype(h.dtype), (scale * hidden).astype(h.dtype), jnp.sum(hidden_bar * hidden, axis=1)


def sigmoid(x):
    """1 / (1 + exp(-x)), as the square of a reciprocal root: two instructions where a division takes ten."""
    root = lax.rsqrt(1 + jnp.exp(-x))
    return root * root


def swiglu(gate: Float[Array, "R F"], up: Float[Array, "R F"]) -> Float[Array, "R F"]:
    """silu(gate) * up (SwiGLU, 2002.05202 eq. 5)."""
    return jax.nn.silu(gate) * up


def _store_sums(acc, refs, outs, staging, share: Share, expert, row, column, ring, slot):
    """The epilogue that does nothing else."""
    columns = pl.ds(column * share.tiles.columns + share.first_column, share.columns)
    store(acc, staging, outs[0].at[share.rows_at(row), columns])
    return slot
