"""Products of few rows with the matrix of their expert, on Hopper: what decoding needs.

    few_rows_product    y = x w                          [R, D] [E, D, F] -> [R, F]
    few_rows_swiglu     silu(x w_gate) * (x w_up)

A tile has so few rows that all time goes into reading matrices. So these take the side of `wgmma` that comes
64 at a time, and rows the side that comes by eights: y^T = w^T x^T. Matrices are float [E, D, F], or int8
[E, F, D] with a scale for each of their columns, which become floats in registers (weight-only, W8A16).

Two small programs share a multiprocessor. Each has a warpgroup that loads and one that multiplies; the other
program's loads go on while one stores its result.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from moe.kernels.groups import Groups
from moe.kernels.hopper.pipeline import DEPTH, ROWS, SHARED_MEMORY, Ring, launch, swizzled
from moe.kernels.hopper.row_products import sigmoid
from moe.kernels.hopper.target import present

PROGRAMS = 2  # of one multiprocessor
STEP = 2 * DEPTH  # of the contraction in one stage: 128 bytes of int8, the widest swizzle
RESERVED = 2048  # bytes of shared memory that a program takes besides
TILES = (8, 16, 32, 64)  # rows of a tile

Matrix = Float[Array, "E D F"] | Int8[Array, "E F D"]


def few_rows_fit(x: Float[Array, "R D"], *matrices: Matrix) -> bool:
    """Whether the kernels take these: rows of two-byte numbers, matrices of the same or of int8."""
    names = {jnp.dtype(w.dtype).name for w in matrices} - {x.dtype.name}
    whole = all(size % (STEP if names else ROWS) == 0 for w in matrices for size in w.shape[1:])
    return present() and x.dtype.name in ("bfloat16", "float16") and names <= {"int8"} and whole


def few_rows_tile(assignments: int, experts: int) -> int | None:
    """Rows of a tile, twice as many as an expert has in the mean; None where they are no longer few."""
    mean = -(-assignments // experts)
    return next((tile for tile in TILES if tile >= 2 * mean), None)


def few_rows_product(
    x: Float[Array, "R D"], w: Matrix, groups: Groups, *, scale: Float[Array, "E F"] | None = None
) -> Float[Array, "R F"]:
    """x @ w[expert].

    Args:
        x: rows grouped by expert.
        w: float [E, D, F], or int8 [E, F, D].
        groups: layout of the rows; a tile has 8, 16, 32 or 64.
        scale: of each column of an int8 matrix, float32.
    """
    return _few_rows("few_rows_product", x, [w], groups, [scale], lambda y: y)


def few_rows_swiglu(
    x: Float[Array, "R D"],
    w_gate: Matrix,
    w_up: Matrix,
    groups: Groups,
    *,
    scales: tuple[Float[Array, "E F"] | None, Float[Array, "E F"] | None] = (None, None),
) -> Float[Array, "R F"]:
    """silu(x @ w_gate[expert]) * (x @ w_up[expert]). For the arguments see `few_rows_product`."""
    return _few_rows(
        "few_rows_swiglu", x, [w_gate, w_up], groups, scales, lambda gate, up: gate * sigmoid(gate) * up
    )


def _few_rows(
    name: str,
    x: Array,
    matrices: Sequence[Array],
    groups: Groups,
    scales: Sequence[Array | None],
    combine: Callable,
) -> Array:
    """Multiply rows with each matrix, and store what `combine` makes of the scaled sums [columns, rows]."""
    (rows, depth), tile, packed = x.shape, groups.tile, matrices[0].dtype == jnp.int8
    width, step = matrices[0].shape[1 if packed else 2], STEP if depth % STEP == 0 else DEPTH
    if packed and step != STEP:
        raise ValueError(f"matrices of int8 need rows of whole {STEP} numbers, not {depth}")
    column_tiles, steps, known = width // ROWS, depth // step, [s for s in scales if s is not None]
    stage = (len(matrices), ROWS, step) if packed else (len(matrices), step, ROWS)
    stages = _stages(tile * step * x.dtype.itemsize + math.prod(stage) * matrices[0].dtype.itemsize, tile)

    def body(expert_ref, used_ref, x_ref, *refs):
        w_refs, scale_refs = refs[: len(matrices)], refs[len(matrices) : -6]
        out_ref, *scratch, staging = refs[-6:]
        ring, warpgroup = Ring(*scratch, stages=stages), lax.axis_index("warpgroup")
        items = (used_ref[0] * column_tiles,)

        def place(info):
            row, column = (f(info.index[0], jnp.int32(column_tiles)) for f in (lax.div, lax.rem))
            return expert_ref[row], pl.ds(row * tile, tile), pl.ds(column * ROWS, ROWS)

        @pl.when(warpgroup == 1)
        def _load():
            @plgpu.nd_loop(items, collective_axes="program", init_carry=jnp.int32(0))
            def _tile(info, carry):
                expert, mine, columns = place(info)

                def load(number, slot, _):
                    k, full = pl.ds(number * step, step), ring.full.at[slot]
                    for i, w_ref in enumerate(w_refs):
                        part = w_ref.at[expert, columns, k] if packed else w_ref.at[expert, k, columns]
                        plgpu.copy_gmem_to_smem(part, ring.a.at[slot, i], full)
                    plgpu.copy_gmem_to_smem(x_ref.at[mine, k], ring.b.at[slot], full)

                return ring.fill(steps, load, carry)[0]

        @pl.when(warpgroup == 0)
        def _multiply():
            ring.release_all()

            @plgpu.nd_loop(items, collective_axes="program", init_carry=jnp.int32(0))
            def _tile(info, carry):
                expert, mine, columns = place(info)

                def with_sums(*sums):
                    def multiply(_, slot):
                        plgpu.barrier_wait(ring.full.at[slot])
                        for i, acc in enumerate(sums):
                            w = ring.a.at[slot, i]
                            left = _floats(w, x.dtype) if packed else w.transpose((1, 0))
                            plgpu.wgmma(acc, left, ring.b.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(ring.empty.at[slot])
                        return ring.next(slot)

                    slot = lax.fori_loop(0, steps, multiply, carry)
                    return [acc[...] for acc in sums], slot

                types = [plgpu.WGMMAAccumulatorRef((ROWS, tile), jnp.float32) for _ in matrices]
                sums, slot = pl.run_scoped(with_sums, *types)
                for i, scale_ref in enumerate(scale_refs):
                    mine_of_scale = scale_ref.at[expert, columns]
                    scale = plgpu.load(mine_of_scale, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                    sums[i] *= lax.broadcast_in_dim(scale, (ROWS, tile), [0])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staging.transpose((1, 0))[...] = combine(*sums).astype(x.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staging, out_ref.at[mine, columns])
                return slot

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = (
        plgpu.SMEM((stages, *stage), matrices[0].dtype, transforms=swizzled(matrices[0].dtype)),
        plgpu.SMEM((stages, tile, step), x.dtype, transforms=swizzled(x.dtype)),
        plgpu.Barrier(num_arrivals=1 + len(matrices), num_barriers=stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        plgpu.SMEM((tile, ROWS), x.dtype, transforms=swizzled(x.dtype)),
    )
    inputs = [groups.tile_experts(rows // tile), groups.used_tiles()[None], x, *matrices, *known]
    out_type = jax.ShapeDtypeStruct((rows, width), x.dtype)
    return launch(body, inputs, out_type, scratch, name, programs=PROGRAMS, warpgroups=2)


def _floats(w, dtype):
    """A stage's int8 matrix, in the registers from which `wgmma` takes its first operand."""
    numbers = plgpu.load(w, layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
    return plgpu.layout_cast(numbers.astype(dtype), plgpu.Layout.WGMMA)


def _stages(stage: int, tile: int) -> int:
    """So many stages of `stage` bytes find room beside the output tile, where programs share the memory."""
    return (SHARED_MEMORY // PROGRAMS - RESERVED - 2 * tile * ROWS) // (stage + 2 * 8)
