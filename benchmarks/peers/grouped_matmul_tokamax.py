"""Measured program: `tokamax.ragged_dot` and its two gradients, untuned, as the package ships it.

See `benchmarks/gpu/cases.py` for how it is run.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import tokamax

from benchmarks.gpu.cases import Record, serve_cases
from benchmarks.gpu.grouped_matmul_jax import grouped
from benchmarks.gpu.shapes import projection
from benchmarks.worker import Task
from moe.kernels import Groups


def start(task: Task):
    """Versions, and what measures a case."""

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        yield from grouped(projection(case, quick=task["quick"]), product, task["rounds"], tile=1)

    return {"versions": {"jax": jax.__version__, "tokamax": version("tokamax")}}, measure


def product(rows: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    """In its Mosaic kernels; `lax.ragged_dot`, its fallback, does E times the work on a GPU."""
    return tokamax.ragged_dot(rows, w, groups.group_sizes, implementation="mosaic_gpu")


if __name__ == "__main__":
    serve_cases(start)
