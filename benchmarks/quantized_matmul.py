"""Few rows times one matrix in every number format: time, weights read, and error against float32.

    uv run benchmarks/quantized_matmul.py
    uv run benchmarks/quantized_matmul.py --inputs 2048 --outputs 1024 --rows 1 8

Rows are bfloat16. Several matrices take turns, so that none stays in a cache; formats take turns too, and a
time is the median over rounds. The error is that of the product with weights and rows that are normally
distributed, |y - y32| / |y32| for the float32 product y32 of the rows with the weights before rounding.
"""

import time
from dataclasses import dataclass
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from moe.kernels.quantized_matmul import quantized_matmul
from moe.quant import FORMATS, QuantizedMatrix, quantize

MATRICES, ROUNDS = 8, 15


@dataclass(frozen=True)
class Options:
    """What to multiply."""

    inputs: int = 1024
    """Rows of a matrix."""

    outputs: int = 4096
    """Its columns."""

    rows: tuple[int, ...] = (1, 8, 64, 512)
    """How many rows go in."""


@jax.jit
def product(rows, w):
    """Of plain or quantised matrices."""
    return quantized_matmul(rows, w) if isinstance(w, QuantizedMatrix) else rows @ w


def main(options: Options) -> None:
    """Measure, and print a table."""
    random = np.random.default_rng(0)
    wide = [random.normal(size=(options.inputs, options.outputs)).astype(np.float32) for _ in range(MATRICES)]
    matrices: dict[str, list] = {"bfloat16": [jnp.asarray(w, jnp.bfloat16) for w in wide]}
    matrices |= {
        name: [jax.jit(quantize, static_argnums=1)(w, format) for w in wide]
        for name, format in FORMATS.items()
    }
    table = Table("rows", "format", "microseconds", "GB/s of weights", "of bfloat16", "error", box=None)
    for count in options.rows:
        rows = jnp.asarray(random.normal(size=(count, options.inputs)), jnp.bfloat16)
        exact = np.asarray(rows, np.float32) @ wide[0]
        taken = {name: [] for name in matrices}
        for _ in range(1 + ROUNDS):
            for name, each in matrices.items():
                began = time.perf_counter()
                jax.block_until_ready([product(rows, w) for w in each])
                taken[name].append((time.perf_counter() - began) / MATRICES)
        for name, each in matrices.items():
            seconds, y = median(taken[name][1:]), np.asarray(product(rows, each[0]), np.float32)
            table.add_row(
                str(count),
                name,
                f"{1e6 * seconds:,.0f}",
                f"{each[0].nbytes / seconds / 1e9:.1f}",
                f"{median(taken['bfloat16'][1:]) / seconds:.2f}",
                f"{np.linalg.norm(y - exact) / np.linalg.norm(exact):.4f}",
            )
    console = Console()
    console.print(f"[{options.inputs}, {options.outputs}] on {jax.devices()[0].device_kind}")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
