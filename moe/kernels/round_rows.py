"""Rows rounded to int8, each with a scale of its own.

CUDA     one kernel that reads a row once, written in Pallas: XLA reads it for its largest number and again
others   `quantize_rows`
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Int8

from moe.kernels import grouped_matmul_triton as triton
from moe.quant.format import Format
from moe.quant.rows import quantize_rows

BLOCK = 4096  # numbers that a program takes, unless a row has more
MOST = 2**15  # of a row: more would not fit into a program's registers


def round_rows(
    x: Float[Array, "R D"], used: Int[Array, ""] | int | None = None
) -> tuple[Int8[Array, "R D"], Float[Array, "R"]]:
    """Codes and float32 scales of each row, its largest number being 127.

    Args:
        x: rows.
        used: how many of them, from the first on; of the others anything may come out. None: all.
    """
    if triton.present() and x.shape[1] <= MOST:
        return in_one_pass(x, used)
    return reference(x)


def reference(x: Float[Array, "R D"]) -> tuple[Int8[Array, "R D"], Float[Array, "R"]]:
    """The same in plain JAX."""
    codes, scales = quantize_rows(x, Format(dynamic=True))
    return codes, scales[:, 0]


def in_one_pass(
    x: Float[Array, "R D"], used: Int[Array, ""] | int | None = None, *, interpret: bool = False
) -> tuple[Int8[Array, "R D"], Float[Array, "R"]]:
    """The kernel. For the arguments see `round_rows`; with `interpret` it runs as plain JAX, anywhere."""
    rows, width = x.shape
    lanes = 1 << (width - 1).bit_length()
    together = max(BLOCK // lanes, 1)

    def kernel(x_ref, used_ref, codes_ref, scale_ref):
        first = pl.program_id(0) * together

        @pl.when(first < used_ref[0])
        def _round():
            row, column = first + lax.iota(jnp.int32, together), lax.iota(jnp.int32, lanes)
            inside = (row < rows)[:, None] & (column < width)[None]
            at = pl.ds(first, together), pl.ds(0, lanes)
            numbers = plgpu.load(x_ref.at[at], mask=inside, other=0).astype(jnp.float32)
            scale = jnp.maximum(jnp.max(jnp.abs(numbers), axis=1) / 127, jnp.finfo(jnp.float32).tiny)
            codes = jnp.floor(numbers / scale[:, None] + 0.5)  # Triton has no rounding of its own here
            codes = jnp.clip(codes, -127, 127).astype(jnp.int32).astype(jnp.int8)
            plgpu.store(codes_ref.at[at], codes, mask=inside)
            plgpu.store(scale_ref.at[pl.ds(first, together)], scale, mask=row < rows)

    axes = jax.sharding.ManualAxisType(varying=jax.typeof(x).mat.varying)
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=axes)
    return pl.pallas_call(
        kernel,
        out_shape=(shape((rows, width), jnp.int8), shape((rows,), jnp.float32)),
        grid=(pl.cdiv(rows, together),),
        compiler_params=plgpu.CompilerParams(num_warps=8 if lanes > BLOCK else 4, num_stages=1),
        interpret=interpret,
        name="round_rows",
    )(x, jnp.asarray(rows if used is None else used, jnp.int32)[None])
