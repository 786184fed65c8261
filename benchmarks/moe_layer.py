"""Whole MoE layers on a GPU: ours against other libraries' and against their products alone, in one run.

    uv run benchmarks/moe_layer.py
    uv run benchmarks/moe_layer.py --quick --device cpu

Router, dispatch, SwiGLU experts and combine: forward, and forward with the gradients of tokens and all
parameters; bfloat16, random data. Experts are used evenly, or by Zipf's law, which the router's weights bring
about in the same way for every library. Beside ours: SonicMoE with its tuned kernels, the Qwen3-MoE block of
transformers with `grouped_mm` experts, and the layer's matrix products alone as `torch.bmm` with equal
groups. Where SonicMoE cannot run, the page shows known figures of it, marked as such.

`benchmarks/gpu/moe_layer_jax.py` says what exactly is timed, `benchmarks/gpu/timing.py` how. Each library
runs in a process of its own, one after the other; figures are medians over rounds. Results go to
`benchmarks/results/moe_layer_GPU.json` and `docs/results/moe_layer_GPU.md`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.gpu.cases import Program
from benchmarks.gpu.command import Common, keep, program, render, run
from benchmarks.gpu.shapes import LAYERS, LayerName, projections
from moe.errors import run_main

OURS = "benchmarks/gpu/moe_layer_jax.py"
PRODUCTS = "benchmarks/peers/grouped_matmul_torch.py"
TRANSFORMERS = "benchmarks/peers/moe_layer_transformers.py"
SONICMOE = "benchmarks/peers/moe_layer_sonicmoe.py"


@dataclass(frozen=True)
class Options(Common):
    """What to measure, and where to keep it."""

    shapes: tuple[LayerName, ...] = tuple(LAYERS)
    """Layers that are measured."""

    peers: tuple[Literal["bmm", "sonicmoe", "transformers", "transformers-compiled"], ...] = (
        "bmm",
        "sonicmoe",
        "transformers",
    )
    """Libraries to compare with."""

    sonicmoe: Path = Path(".peers/sonicmoe")
    """Folder that holds SonicMoE's packages, and its tuning results as `qc` (`benchmarks/peers/pack.sh`)."""


def main() -> None:
    """Measure, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    if options.render:
        render(options.render, "moe_layer")
        return
    known = {
        "bmm": program(options, "torch", PRODUCTS, torch=True, programs=["torch.bmm"]),
        "sonicmoe": sonicmoe(options),
        "transformers": program(options, "transformers", TRANSFORMERS, torch=True, compiled=False),
        "transformers-compiled": program(
            options, "transformers, torch.compile", TRANSFORMERS, torch=True, compiled=True
        ),
    }
    layers = [{"name": LAYERS[name].name, "layer": name} for name in options.shapes]
    products = projections(options.shapes)
    products[0] |= {"baseline": True}
    work = [(program(options, "Switchyard", OURS, torch=False), layers)]
    work += [(known[name], products if name == "bmm" else layers) for name in options.peers]
    keep(options, "moe_layer", run(options, work))


def sonicmoe(options: Options) -> Program:
    """SonicMoE with its own packages before all others, and its tuning results."""
    plain, site = program(options, "SonicMoE", SONICMOE, torch=True), options.sonicmoe.resolve()
    own = (site, site / "nvidia_cutlass_dsl" / "python_packages")
    tuned = {"QUACK_CACHE_DIR": str(site / "qc"), "QUACK_CACHE_AUTOTUNING": "1"}
    return replace(plain, path=(*own, *plain.path), environment=plain.environment | tuned)


if __name__ == "__main__":
    run_main(main)
