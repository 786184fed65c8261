"""Products of single rows with the matrix of their expert, on CUDA cards from Ampere on: Triton, in Pallas.

    vector_swiglu    silu(x w_gate) * (x w_up)   each assignment's token with its expert's matrices
    vector_product   x w                         each assignment's row with its expert's matrix

For decode steps of few tokens. A row is multiplied on the way of the weights through the registers, without
tensor cores; nothing is sorted or padded, so no plan is needed; and columns are cut so finely that every
multiprocessor reads. An expert with two rows is read twice, the second time mostly from the L2 cache.

Matrices are int8 or int4, as `QuantizedMatrix` stores them: what a sum goes over lies together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from moe.kernels import grouped_matmul_triton as triton
from moe.quant.matrix import QuantizedMatrix

COLUMNS, STORED = 16, 128  # of a matrix: in whole numbers of which they are cut
PLACES = 2**31  # Pallas counts places in 32 bits with a sign, and from twice as many bytes on in 64


@dataclass(frozen=True)
class Cut:
    """How a product is cut; every number a power of two.

    These are the best of nine at batch 1 on one H100: experts of Qwen3-30B-A3B take 23 us in int8 (1.6 TB/s),
    those of Mixtral 148 (2.4 TB/s).
    """

    columns: int = 4
    """Of one program, at most."""

    depth: int = 512
    """Bytes of a column that are read in one step, at most."""

    warps: int = 4
    """Of one program."""

    together: int = 2
    """Steps whose loads may be started together."""


def vectors_fit(x: Float[Array, "T D"], *matrices: Array | QuantizedMatrix) -> bool:
    """Whether the kernels take these, here: int8 with a scale a column, or int4 in groups."""
    return triton.present() and all(isinstance(w, QuantizedMatrix) and _fits(w) for w in matrices)


def _fits(w: QuantizedMatrix) -> bool:
    _, columns, stored = w.values.shape
    known = {"int8": w.scales.shape[-1] == 1, "int4": w.scales.shape[-1] % 2 == 0}
    counted = not PLACES <= w.values.size <= 2 * PLACES
    return known.get(w.format.codes, False) and counted and not columns % COLUMNS and not stored % STORED


def vector_swiglu(
    x: Float[Array, "T D"],
    w_gate: QuantizedMatrix,
    w_up: QuantizedMatrix,
    token: Int[Array, "A"],
    expert: Int[Array, "A"],
    *,
    cut: Cut = Cut(),
    interpret: bool = False,
) -> Float[Array, "A F"]:
    """silu(x[token] w_gate[expert]) * (x[token] w_up[expert]); zeros where there is no such expert."""

    def combine(gate, up):
        return gate / (1 + jnp.exp(-gate)) * up

    return _vectors("vector_swiglu", x, [w_gate, w_up], token, expert, combine, cut, interpret)


def vector_product(
    x: Float[Array, "A D"],
    w: QuantizedMatrix,
    expert: Int[Array, "A"],
    *,
    cut: Cut = Cut(),
    interpret: bool = False,
) -> Float[Array, "A F"]:
    """x w[expert], each row by itself; zeros where there is no such expert."""
    return _vectors("vector_product", x, [w], None, expert, lambda y: y, cut, interpret)


def _vectors(
    name: str,
    x: Array,
    matrices: Sequence[QuantizedMatrix],
    token: Array | None,
    expert: Array,
    combine: Callable,
    cut: Cut,
    interpret: bool,
) -> Array:
    experts, width, _ = matrices[0].values.shape
    columns = min(cut.columns, width & -width)
    blocks, form = width // columns, _form(matrices[0], cut.depth)
    together = math.gcd(cut.together, form.steps)

    def kernel(x_ref, expert_ref, *refs):
        token_ref, *refs = (None, *refs) if token is None else refs
        *refs, out_ref = refs
        pairs = list(zip(refs[::2], refs[1::2], strict=True))
        assignment, block = lax.div(pl.program_id(0), blocks), lax.rem(pl.program_id(0), blocks)
        row, expert = assignment if token_ref is None else token_ref[assignment], expert_ref[assignment]
        mine = pl.ds(block * columns, columns)
        out, here = out_ref.at[assignment, mine], (expert >= 0) & (expert < experts)

        @pl.when(here)
        def _multiply():
            def step(i, sums):
                for j in range(together):
                    at = i * together + j, row, expert, mine
                    sums = [s + form.products(x_ref, *pair, *at) for s, pair in zip(sums, pairs, strict=True)]
                return sums

            zeros = [jnp.zeros((columns, *form.block), jnp.float32) for _ in pairs]
            sums = lax.fori_loop(0, form.steps // together, step, zeros)
            finished = [
                form.finish(s, scales, expert, mine) for s, (_, scales) in zip(sums, pairs, strict=True)
            ]
            plgpu.store(out, combine(*finished).astype(out_ref.dtype))

        @pl.when(~here)
        def _nothing():
            plgpu.store(out, jnp.zeros((columns,), out_ref.dtype))

    inputs = [form.rows(x), expert] if token is None else [form.rows(x), expert, token]
    for w in matrices:
        inputs += form.stored(w)
    axes = frozenset().union(*(jax.typeof(a).mat.varying for a in inputs))
    varying = jax.sharding.ManualAxisType(varying=axes)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(expert), width), x.dtype, manual_axis_type=varying),
        grid=(len(expert) * blocks,),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*inputs)


def _form(w: QuantizedMatrix, depth: int) -> "_Int8 | _Int4":
    """How a format is read, a step at a time; a step's products lie [columns, *block]."""
    *_, stored = w.values.shape
    if w.format.codes == "int8":
        depth = min(depth, stored & -stored)
        return _Int8((depth,), stored // depth)
    groups = w.scales.shape[-1] // 2  # in either half of the inputs
    size = stored // groups
    at_once = min(max(depth // size, 1), groups & -groups)
    return _Int4((at_once, size), groups // at_once)


@dataclass(frozen=True)
class _Int8:
    block: tuple[int]
    steps: int

    def rows(self, x):
        return x

    def stored(self, w):
        return w.values, w.scales[..., 0]

    def products(self, x_ref, codes_ref, scales_ref, i, row, expert, columns):
        at = pl.ds(i * self.block[0], self.block[0])
        codes = plgpu.load(codes_ref.at[expert, columns, at], eviction_policy="evict_first")
        return codes.astype(jnp.float32) * plgpu.load(x_ref.at[row, at]).astype(jnp.float32)[None]

    def finish(self, sums, scales_ref, expert, columns):
        return jnp.sum(sums, axis=1) * plgpu.load(scales_ref.at[expert, columns])


@dataclass(frozen=True)
class _Int4:
    """A byte holds a code of either half of the inputs; codes of a group lie together."""

    block: tuple[int, int]
    steps: int

    def rows(self, x):
        return x.reshape(len(x), 2, -1, self.block[1])

    def stored(self, w):
        experts, columns, _ = w.values.shape
        codes = w.values.reshape(experts, columns, -1, self.block[1])
        return codes, w.scales.reshape(experts, columns, 2, -1)

    def products(self, x_ref, codes_ref, scales_ref, i, row, expert, columns):
        groups, size = pl.ds(i * self.block[0], self.block[0]), pl.ds(0, self.block[1])
        pairs = plgpu.load(codes_ref.at[expert, columns, groups, size], eviction_policy="evict_first")
        pairs, total = pairs.astype(jnp.int32), 0.0
        for half, codes in ((jnp.int32(0), pairs & 15), (jnp.int32(1), pairs >> 4)):
            x = plgpu.load(x_ref.at[row, half, groups, size]).astype(jnp.float32)
            scales = plgpu.load(scales_ref.at[expert, columns, half, groups]).astype(jnp.float32)
            total += (codes - 8).astype(jnp.float32) * x[None] * scales[..., None]
        return total

    def finish(self, sums, scales_ref, expert, columns):
        return jnp.sum(sums, axis=(1, 2))
