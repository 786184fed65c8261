"""Grouped matrix products on a GPU: ours against dense ones and other libraries', in one run.

    uv run benchmarks/grouped_matmul.py
    uv run benchmarks/grouped_matmul.py --quick --device cpu

For the up-projection (gate and up matrix side by side) and the down-projection of each shape: the product and
its two gradients, each by itself, in bfloat16 on random data; expert loads equal and Zipf-distributed. Beside
them, in the same run: a dense product of equal FLOPs and one of 8192³ through XLA and torch, `torch.bmm` with
equal groups, `torch._grouped_mm`, and `tokamax.ragged_dot` as shipped, untuned.

Each framework runs in a process of its own, one after the other. `benchmarks/gpu/timing.py` says how a time
is taken; figures are medians over rounds. Results go to `benchmarks/results/grouped_matmul_GPU.json` and
`docs/results/grouped_matmul_GPU.md`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.gpu.command import Common, keep, program, render, run
from benchmarks.gpu.shapes import MATMULS, MatmulName, projections
from moe.errors import run_main

OURS = "benchmarks/gpu/grouped_matmul_jax.py"
TORCH = "benchmarks/peers/grouped_matmul_torch.py"
TOKAMAX = "benchmarks/peers/grouped_matmul_tokamax.py"


@dataclass(frozen=True)
class Options(Common):
    """What to measure, and where to keep it."""

    shapes: tuple[MatmulName, ...] = tuple(MATMULS)
    """Layers whose projections are measured."""

    peers: tuple[Literal["torch", "tokamax"], ...] = ("torch", "tokamax")
    """Libraries to compare with."""

    tokamax: Path = Path(".peers/tokamax")
    """Folder that holds tokamax's packages (`benchmarks/peers/pack.sh`)."""


def main() -> None:
    """Measure, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    if options.render:
        render(options.render, "grouped_matmul")
        return
    programs = [program(options, "Switchyard", OURS, torch=False)]
    if "torch" in options.peers:
        kinds = ["torch.mm", "torch.bmm", "torch._grouped_mm"]
        programs.append(program(options, "torch", TORCH, torch=True, programs=kinds))
    if "tokamax" in options.peers:
        plain = program(options, "tokamax.ragged_dot", TOKAMAX, torch=False)
        programs.append(replace(plain, path=(options.tokamax.resolve(), *plain.path)))
    cases = projections(options.shapes)
    cases[0] |= {"baseline": True}
    keep(options, "grouped_matmul", run(options, [(program, cases) for program in programs]))


if __name__ == "__main__":
    run_main(main)
