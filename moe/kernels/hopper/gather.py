"""Rows of a matrix, each from its own place, straight into a stage of shared memory.

Hopper's copy engine takes boxes only, so every thread of the loader copies pieces of 16 bytes (`cp.async`),
and the stage's barrier counts them when they land: the loader never waits for them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.lowering import register_lowering_rule
from jax._src.state import primitives as state_primitives
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from moe.kernels.hopper.pipeline import swizzled

THREADS, PIECE = 128, 16  # of the loader; bytes that one copy takes
WIDE = 4096  # columns of an expert's hidden layer
SCALAR = plgpu.Layout.WG_SPLAT(())
_inline: Any = plgpu.inline_mgpu  # adds the context to a function's arguments, which its type does not say


def gathers_first(hidden: int) -> bool:
    """Whether a layer writes its tokens down as rows instead of gathering them in every load.

    A kernel loads a row once for every tile of columns, and loads by threads cost 5 to 9 % of its time (one
    H100); to write the rows takes 260 / hidden of it (4 bytes a number at 2.5 TB/s against 4 hidden
    operations at 650 TF/s). For few columns the first is less, for wide experts the second.
    """
    return hidden >= WIDE


@dataclass(frozen=True)
class RowGather:
    """Copies [rows, columns] pieces of chosen rows of a matrix."""

    rows: int
    columns: int
    itemsize: int
    """Bytes of a number."""

    @property
    def _pieces(self) -> int:
        """Of one row."""
        return self.columns * self.itemsize // PIECE

    @property
    def _copies(self) -> int:
        """Of one thread, for one stage."""
        return self.rows * self._pieces // THREADS

    @property
    def _layout(self):
        """One register of a thread holds the row of one of its copies."""
        return plgpu.Layout.WG_STRIDED((self._copies * THREADS,), vec_size=1)

    def _place(self, thread: ir.Value, i: int) -> tuple[ir.Value, ir.Value]:
        """Row and piece of a thread's copy number i in the stage: neighbours take neighbouring pieces."""
        i32 = ir.IntegerType.get_signless(32)
        pieces = utils.c(self._pieces, i32)
        row = arith.addi(arith.divui(thread, pieces), utils.c(i * (THREADS // self._pieces), i32))
        return row, arith.remui(thread, pieces)

    def tokens(self, token_ref, first) -> jax.Array:
        """What `start` needs to know: the rows of the matrix that rows `first` and following stand for."""
        shape = plgpu.ShapeDtypeStruct((self._copies * THREADS,), jnp.int32, layout=self._layout)

        @_inline(arg_types=(plgpu.RefType(), SCALAR), return_type=shape)
        def read(ctx, tokens, first):
            i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
            thread, base = _thread(), _global(utils.memref_ptr(tokens))
            found = []
            for i in range(self._copies):
                at = arith.addi(first.registers.flat[0], self._place(thread, i)[0])
                value = llvm.load(i32, utils.getelementptr(base, [arith.extui(i64, at)], i32))
                found.append(vector.broadcast(ir.VectorType.get((1,), i32), value))
            registers = np.array(found, dtype=object)
            return FragmentedArray(_registers=registers, _layout=self._layout.to_mgpu(), _is_signed=True)

        return read(token_ref, first)

    def start(self, x_ref, tokens, column, into, barrier) -> None:
        """Start the copies of columns `column` and following of rows `tokens`; they arrive at the barrier."""
        types = (plgpu.RefType(), self._layout, SCALAR, plgpu.RefType(swizzled(x_ref.dtype)))

        @_inline(arg_types=types)
        def copy(ctx, x, tokens, column, into):
            i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
            width = ir.MemRefType(x.type).shape[1]
            number = ir.MemRefType(x.type).element_type
            thread = _thread()
            source, target = _global(utils.memref_ptr(x)), utils.memref_ptr(into)
            for i in range(self._copies):
                row, piece = self._place(thread, i)
                token = vector.extract(tokens.registers.flat[i], dynamic_position=[], static_position=[0])
                numbers = utils.c(PIECE // self.itemsize, i32)
                at = arith.addi(column.registers.flat[0], arith.muli(piece, numbers))
                offset = arith.addi(
                    arith.muli(arith.extui(i64, token), utils.c(width, i64)), arith.extui(i64, at)
                )
                nvvm.cp_async_shared_global(
                    utils.getelementptr(target, [self._swizzled(row, piece)], number),
                    utils.getelementptr(source, [offset], number),
                    PIECE,
                    nvvm.LoadCacheModifierKind.CG,
                )

        copy(x_ref, tokens, column, into)
        _mark_when_copied(barrier)

    def _swizzled(self, row: ir.Value, piece: ir.Value) -> ir.Value:
        """Where a piece stands in a stage: tiles of 8 rows of 128 bytes, their pieces swapped by row."""
        i32 = ir.IntegerType.get_signless(32)

        def number(value):
            return utils.c(value, i32)

        tile_row, in_row = arith.divui(row, number(8)), arith.remui(row, number(8))
        tile_column, in_tile = arith.divui(piece, number(8)), arith.remui(piece, number(8))
        tile = arith.addi(arith.muli(tile_row, number(self._pieces // 8)), tile_column)
        swapped = arith.xori(in_tile, in_row)
        strides = [number(pieces * PIECE // self.itemsize) for pieces in (64, 8, 1)]
        return utils.dyn_dot([tile, in_row, swapped], strides)


def see_copies() -> None:
    """Let `wgmma` see a full stage that threads have written, not the copy engine."""

    @_inline()
    def fence(ctx):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


# Pallas has no name yet for the arrival of a thread's own copies; `barrier_arrive` is the model.
_arrive_with_copies = Primitive("arrive_with_copies")
_arrive_with_copies.multiple_results = True


def _mark_when_copied(barrier) -> None:
    """Arrive at a barrier, once for all threads, when the copies that each has started are done."""
    barrier, transforms = state_primitives.get_ref_and_transforms(barrier, None, "arrive_with_copies")
    leaves, tree = jax.tree.flatten(transforms)
    _arrive_with_copies.bind(barrier, *leaves, tree=tree)


@_arrive_with_copies.def_effectful_abstract_eval
def _no_result(barrier, *leaves, tree):
    return (), {core._memory_effect}


@register_lowering_rule(_arrive_with_copies, plgpu.LoweringSemantics.Lane)
def _arrive(ctx, barrier, *leaves, tree):
    index = primitives._get_barrier_base_index(ctx.avals_in[0], tree.unflatten(leaves))
    nvvm.cp_async_mbarrier_arrive(barrier[index].get_ptr(), noinc=True)
    return ()


def _thread() -> ir.Value:
    """Of the warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.remui(utils.thread_idx(), utils.c(THREADS, i32))


def _global(pointer: ir.Value) -> ir.Value:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)
