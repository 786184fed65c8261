"""Measured program: `moe.kernels.grouped_matmul`, its two gradients, and XLA's dense product of equal FLOPs.

See `cases.py` for how it is run.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.cases import Record, attempt, serve_cases
from benchmarks.gpu.shapes import ROUTINGS, MatmulShape, group_sizes, projection
from benchmarks.gpu.timing import seconds_of_rounds
from benchmarks.worker import Task
from moe.dispatch import Dropless
from moe.kernels import Groups, grouped_matmul, rows_needed

Product = Callable[[jax.Array, jax.Array, Groups], jax.Array]

CHECKED_ROWS = 1024  # of each expert, in the errors of the products with matrices
CHECKED_COLUMNS = 128  # in the error of the weight gradient, whose every number sums over all rows
UNTUNED = {"xla_gpu_autotune_level": 0}  # compiler options of what is not timed


def start(task: Task):
    """Versions, and what measures a case."""

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        shape = projection(case, quick=task["quick"])
        yield from grouped(shape, grouped_matmul, task["rounds"], tile=Dropless().tile)
        yield dense(shape.name, shape.rows, shape.inner, shape.outer, task["rounds"])
        if case.get("baseline"):
            side = 256 if task["quick"] else 8192
            yield dense("dense 8192", side, side, side, task["rounds"])

    return {"versions": {"jax": jax.__version__}, "device": jax.devices()[0].device_kind}, measure


def grouped(shape: MatmulShape, product: Product, rounds: int, *, tile: int) -> Iterator[Record]:
    """The product and its gradients under every routing.

    Args:
        shape: of the product.
        product: rows grouped by expert, matrices and groups to rows.
        rounds: see `timing`.
        tile: every group starts at a multiple of so many rows.
    """
    inputs = {routing: data(shape, group_sizes(shape.layer, routing), tile) for routing in ROUTINGS}
    arguments = inputs[ROUTINGS[0]]
    ways = passes_of(product)
    with ThreadPoolExecutor() as pool:  # compiles side by side, before anything is timed
        runs = {name: pool.submit(compiled, one, *arguments) for name, one in ways.items()}
        errors = {name: pool.submit(compiled_error, name, one, arguments) for name, one in ways.items()}

    for name in ways:

        def measure(name=name) -> Iterator[Record]:
            run, error = runs[name].result(), errors[name].result()
            for routing, arguments in inputs.items():
                yield {
                    "routing": routing,
                    "pass": name,
                    "flops": shape.flops(),
                    "error": float(error(*arguments, run(*arguments))),
                    "seconds": seconds_of_rounds(partial(run, *arguments), jax.block_until_ready, rounds),
                } | memory_of(run)

        yield from attempt(measure, **{"pass": name})


def compiled(function: Callable, *arguments: Any, **options: Any) -> jax.stages.Compiled:
    """The executable for arguments of these shapes."""
    return jax.jit(function, **options).lower(*arguments).compile()


def compiled_error(name: str, one: Callable, arguments: tuple) -> jax.stages.Compiled:
    """The executable that finds the error of a pass, not tuned for speed."""
    out = jax.eval_shape(one, *arguments)
    return compiled(ERRORS[name], *arguments, out, compiler_options=UNTUNED)


def data(shape: MatmulShape, sizes: np.ndarray, tile: int) -> tuple[jax.Array, jax.Array, Groups, jax.Array]:
    """Rows, matrices, groups, and cotangents of the product; zeros where no assignment lies."""
    held = jnp.asarray(rows_held(sizes, tile))[:, None]
    rows, cotangent = (
        normal(seed, (held.shape[0], width)) * held for seed, width in ((2, shape.inner), (3, shape.outer))
    )
    w = normal(1, (shape.experts, shape.inner, shape.outer)) * shape.inner**-0.5
    return rows, w, Groups(jnp.asarray(sizes), tile), cotangent


def passes_of(product: Product) -> dict[str, Callable]:
    """Forward, and each gradient by itself, of (rows, w, groups, cotangent)."""

    def data_gradient(rows, w, groups, cotangent):
        return jax.vjp(lambda rows: product(rows, w, groups), rows)[1](cotangent)[0]

    def weight_gradient(rows, w, groups, cotangent):
        return jax.vjp(lambda w: product(rows, w, groups), w)[1](cotangent)[0]

    def forward(rows, w, groups, cotangent):
        return product(rows, w, groups)

    return {"forward": forward, "data gradient": data_gradient, "weight gradient": weight_gradient}


def forward_error(rows, w, groups, _, y) -> jax.Array:
    """|y - float32 y| / |float32 y| over the first rows of every expert."""

    def squares(expert):
        start, size = groups.starts()[expert], groups.group_sizes[expert]
        count = min(CHECKED_ROWS, rows.shape[0])
        first = jnp.minimum(start, rows.shape[0] - count)
        row = first + jnp.arange(count)[:, None]
        mine = (row >= start) & (row < start + size)
        x, found = (jax.lax.dynamic_slice_in_dim(a, first, count).astype(jnp.float32) for a in (rows, y))
        return _squares(found, _exact(x, w[expert].astype(jnp.float32)), mine)

    return _ratio(jax.lax.map(squares, jnp.arange(w.shape[0])))


def data_gradient_error(_, w, groups, cotangent, rows_bar) -> jax.Array:
    """The same of the rows' gradient: the product with the matrices transposed."""
    return forward_error(cotangent, jnp.swapaxes(w, 1, 2), groups, None, rows_bar)


def weight_gradient_error(rows, w, groups, cotangent, w_bar) -> jax.Array:
    """The same over the first columns of the gradients of the experts with the most and the fewest rows."""
    columns = slice(None, CHECKED_COLUMNS)
    expert_of_row = jnp.repeat(groups.tile_experts(rows.shape[0] // groups.tile), groups.tile)

    def squares(expert):
        mine = (expert_of_row == expert)[:, None] * rows[:, columns].astype(jnp.float32)
        exact = _exact(mine.T, cotangent.astype(jnp.float32))
        return _squares(w_bar[expert, columns].astype(jnp.float32), exact, True)

    return _ratio(jax.lax.map(squares, jnp.argsort(groups.group_sizes)[jnp.array([-1, 0])]))


ERRORS = {
    "forward": forward_error,
    "data gradient": data_gradient_error,
    "weight gradient": weight_gradient_error,
}


def dense(name: str, rows: int, inner: int, outer: int, rounds: int) -> Record:
    """[rows, inner] x [inner, outer] through XLA."""
    x, w = normal(4, (rows, inner)), normal(5, (inner, outer)) * inner**-0.5
    run = jax.jit(jnp.matmul)
    return {
        "program": "XLA",
        "case": name,
        "routing": "dense",
        "pass": "forward",
        "flops": 2 * rows * inner * outer,
        "seconds": seconds_of_rounds(lambda: run(x, w), jax.block_until_ready, rounds),
    }


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers in bfloat16."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def rows_held(sizes: np.ndarray, tile: int) -> np.ndarray:
    """True for rows that hold an assignment, False for padding."""
    held = np.zeros(rows_needed(int(sizes.sum()), len(sizes), tile), bool)
    padded = -(-sizes // tile) * tile
    for start, size in zip(np.cumsum(padded) - padded, sizes, strict=True):
        held[start : start + size] = True
    return held


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of device memory that its arguments take, and what it needs besides: results and temporaries."""
    memory = compiled.memory_analysis()
    working = memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {"argument_bytes": memory.argument_size_in_bytes, "working_bytes": working}


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _ratio(squares: jax.Array) -> jax.Array:
    wrong, exact = squares.sum(0)
    return jnp.sqrt(wrong / exact)


def _squares(found: jax.Array, exact: jax.Array, counted) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.where(counted, a, 0) ** 2) for a in (found - exact, exact)])


if __name__ == "__main__":
    serve_cases(start)
