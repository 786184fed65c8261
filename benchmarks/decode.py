"""Generating on a GPU: experts of a decode step by the bytes they read, prefills, a whole model, one request.

    uv run benchmarks/decode.py
    uv run benchmarks/decode.py --only layers
    uv run benchmarks/decode.py --quick --device cpu

- Experts of one decode step with their dispatch, in bfloat16 and weight-only int8: bytes of the experts that
  tokens go to over time, against the rate of a copy in the same run.
- The same over a prompt of 4096 tokens, in bfloat16 and with int8 rows too (W8A8).
- OLMoE-1B-7B with random weights: tokens/s of prompts read and of tokens made, against transformers.
- The same model asked for 32 tokens behind a prompt of 512, again and again: median and 99th percentile.

`benchmarks/gpu/decode_layer_jax.py` and `decode_model_jax.py` say what exactly is timed. Results go to
`benchmarks/results/decode_GPU.json` and `docs/results/decode_GPU.md`.
"""

from dataclasses import dataclass
from typing import Literal

import tyro

from benchmarks.gpu.command import Common, keep, program, render, run
from benchmarks.gpu.decode_shapes import BATCHES, DECODED
from moe.errors import run_main

LAYERS, MODEL = "benchmarks/gpu/decode_layer_jax.py", "benchmarks/gpu/decode_model_jax.py"
TRANSFORMERS = "benchmarks/peers/decode_transformers.py"


@dataclass(frozen=True)
class Options(Common):
    """What to measure, and where to keep it."""

    only: Literal["layers", "model", ""] = ""
    """A part of it."""


def main() -> None:
    """Measure, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    if options.render:
        render(options.render, "decode")
        return
    work = []
    if options.only != "model":
        cases = [{"name": "copy", "kind": "copy"}]
        for key, shape in DECODED.items():
            cases.append({"name": shape.name, "kind": "decode", "layer": key})
            cases.append({"name": shape.name, "kind": "prefill", "layer": key})
        work.append((program(options, "Switchyard", LAYERS, torch=False), cases))
    if options.only != "layers":
        batches, requests = (BATCHES[:1], 3) if options.quick else (BATCHES, 200)
        generation = [{"name": f"OLMoE-1B-7B, batch {batch}", "batch": batch} for batch in batches]
        request = {"name": "OLMoE-1B-7B, one request", "requests": requests}
        work.append((program(options, "Switchyard", MODEL, torch=False), [*generation, request]))
        work.append((program(options, "transformers", TRANSFORMERS, torch=True), generation))
    keep(options, "decode", run(options, work))


if __name__ == "__main__":
    run_main(main)
