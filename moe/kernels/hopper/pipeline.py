"""What all Hopper kernels share: a persistent, warp-specialised loop around `wgmma`.

One program runs on every multiprocessor and takes output tiles in turn. It has three warpgroups: one loads
stages of operands into a ring in shared memory, two multiply them. The loader runs ahead into the next output
tile while the others still store the last one.

    loader      wait until a stage is empty, start its copies; they mark it full
    multipliers wait until it is full, multiply, mark the stage before it empty
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SWIZZLE = 128  # bytes, the widest
DEPTH = SWIZZLE // 2  # of the contraction in one stage of two-byte numbers
MULTIPLIERS = 2  # warpgroups that multiply
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 56, 224  # of a thread; 128 * (56 + 2 * 224) fit the file of 65,536
SHARED_MEMORY = 227 * 1024  # bytes a program may have
ROWS, CHUNK = 64, 64  # of a piece of output that is staged and stored at a time
MULTIPROCESSORS = 132  # of an H100 or H200, where no device is there to be asked


@dataclass(frozen=True)
class Tiles:
    """How a product is cut."""

    rows: int = 128
    """Of an output tile."""

    columns: int = 256
    """Of an output tile."""

    stages: int = 4
    """Depth of the ring of operands."""

    strip: int = 4
    """Output tiles taken one after the other across a strip of the output, before the next ones along it."""

    along: str = "rows"
    """Strips are so many column tiles wide and run along "rows", or row tiles high along "columns"."""

    def place(self, index, rows, columns):
        """Row and column of the output tile whose turn it is; the output has rows x columns of them."""
        return plgpu.planar_snake(index, (rows, columns), 1 if self.along == "rows" else 0, self.strip)


def stage_depth(dtype: Any) -> int:
    """Length of the contraction in one stage: as many numbers as the widest swizzle takes."""
    return SWIZZLE // jnp.dtype(dtype).itemsize


def swizzled(dtype: Any = jnp.bfloat16) -> tuple:
    """The layout in shared memory that `wgmma` and the copy engine read without conflicts."""
    tiled: Any = plgpu.TilingTransform  # both seem abstract to type checkers
    swizzle: Any = plgpu.SwizzleTransform
    return tiled((8, stage_depth(dtype))), swizzle(SWIZZLE)


@dataclass(frozen=True)
class Ring:
    """Stages of two operands, and the barriers between loader and multipliers."""

    a: Any
    b: Any
    full: Any
    empty: Any
    stages: int

    @staticmethod
    def scratch(a_shape: tuple[int, ...], b_shape: tuple[int, ...], stages: int, copies: int, dtype) -> tuple:
        """Types of `a`, `b`, `full` and `empty`, where as many copies fill a stage."""
        return (
            plgpu.SMEM((stages, *a_shape), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((stages, *b_shape), dtype, transforms=swizzled(dtype)),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=stages),
        )

    def next(self, slot):
        """The stage after this one."""
        return lax.select(slot == self.stages - 1, jnp.int32(0), slot + 1)

    def before(self, slot):
        """The stage before this one."""
        return lax.select(slot == 0, jnp.int32(self.stages - 1), slot - 1)

    def fill(self, steps, load: Callable, slot, carry=None):
        """Load `steps` stages from `slot` on, each as soon as it is empty.

        Args:
            steps: how many.
            load: `load(step, slot, carry)` starts the copies of one and gives the new carry.
            slot: the first.
            carry: anything.

        Returns:
            The stage after the last, and the last carry.
        """

        def one(step, state):
            slot, carry = state
            plgpu.barrier_wait(self.empty.at[slot])
            carry = load(step, slot, carry)
            return self.next(slot), carry

        return lax.fori_loop(0, steps, one, (slot, carry))

    def release_all(self):
        """Mark every stage empty, before the first is waited for."""
        for slot in range(self.stages):
            plgpu.barrier_arrive(self.empty.at[slot])

    def multiply(self, steps, products: Callable, slot, on_full: Callable | None = None):
        """Multiply `steps` stages.

        Args:
            steps: how many.
            products: `products(slot)` lists accumulator, left and right operand of each product of a stage.
            slot: the first.
            on_full: called when a stage is full, before it is read.

        Returns:
            The stage after the last.
        """

        def one(step, slot):
            plgpu.barrier_wait(self.full.at[slot])
            if on_full:
                on_full()
            started = [plgpu.wgmma(*product) for product in products(slot)]
            plgpu.wgmma_wait(len(started))
            plgpu.barrier_arrive(self.empty.at[self.before(slot)], predicate=step > 0)
            return self.next(slot)

        slot = lax.fori_loop(0, steps, one, slot)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.empty.at[self.before(slot)], predicate=steps > 0)
        return slot


def staging_type(dtype):
    """Where the multipliers put pieces of their results for the copy engine: two for each, used in turn."""
    return plgpu.SMEM((MULTIPLIERS, 2, ROWS, CHUNK), dtype, transforms=swizzled())


def store(values, staging, out) -> None:
    """Write a tile of sums, piece by piece.

    Args:
        values: [rows, columns] in registers.
        staging: [2, ROWS, CHUNK] of shared memory.
        out: [rows, columns] of global memory; what lies outside of the array is not written.
    """
    rows, columns = values.shape
    pieces = [(i, j) for i in range(0, rows, ROWS) for j in range(0, columns, CHUNK)]
    for turn, (i, j) in enumerate(pieces):
        to = out.at[pl.ds(i, ROWS), pl.ds(j, CHUNK)]
        store_piece(values[i : i + ROWS, j : j + CHUNK], staging, to, turn)


def store_piece(values, staging, out, turn: int) -> None:
    """Write [ROWS, CHUNK] numbers through the piece of `staging` whose turn it is."""
    slot = turn % 2
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    staging.at[slot][...] = values.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging.at[slot], out)


def multiprocessors() -> int:
    """Of the card that runs this program."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else MULTIPROCESSORS


def launch(
    body: Callable,
    inputs: Sequence,
    out_type,
    scratch: Sequence,
    name: str,
    *,
    programs: int = 1,
    warpgroups: int = MULTIPLIERS + 1,
):
    """Run `body(*input_refs, *output_refs, *scratch_refs)` on every multiprocessor.

    The results vary over the mesh axes over which any input varies.

    Args:
        body: the program.
        inputs: arrays.
        out_type: of the results.
        scratch: shared memory and barriers of a program.
        name: of the kernel.
        programs: that share a multiprocessor.
        warpgroups: of a program.
    """
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=tuple(scratch),
        grid=(programs * multiprocessors(),),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        # No thread here both reads and writes a piece of shared memory; what passes between threads passes
        # through the ring's barriers or `commit_smem`.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in inputs))
    varying = tuple(sorted(axes))
    return jax.tree.map(lambda y: lax.pcast(y, varying, to="varying") if varying else y, kernel(*inputs))
