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
`benchmarks/results/decode_GPU.json` and `docs/results/decode_GPU.md`; those of one part replace its
earlier ones there, and the other parts stay if they are of the same card, each with its own commit.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from benchmarks.gpu.command import Common, keep, program, render, results_file, run
from benchmarks.gpu.decode_shapes import BATCHES, DECODED, FORMATS
from moe.errors import run_main

LAYERS, MODEL = "benchmarks/gpu/decode_layer_jax.py", "benchmarks/gpu/decode_model_jax.py"
TRANSFORMERS = "benchmarks/peers/decode_transformers.py"


@dataclass(frozen=True)
class Options(Common):
    """What to measure, and where to keep it."""

    only: Literal["layers", "prefill", "model", "request", ""] = ""
    """A part of it."""


def main() -> None:
    """Measure, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    if options.render:
        render(options.render, "decode")
        return
    parts = parts_of(options)
    chosen = {part: parts[part] for part in ([options.only] if options.only else parts)}
    results = run(options, [work for of_part in chosen.values() for work in of_part])
    names = (part for part, of_part in chosen.items() for _ in of_part)
    for part, told in zip(names, results["programs"], strict=True):
        told |= {"part": part} | {key: results[key] for key in ("date", "commit", "modified")}
    kept = results_file(options, "decode", results)
    if options.only and kept.exists():
        results = joined(json.loads(kept.read_text()), results)
    keep(options, "decode", results)


def parts_of(options: Options) -> dict[str, list]:
    """The programs of each part, with their cases."""
    layers, prefill = [{"name": "copy", "kind": "copy"}], []
    for key, shape in DECODED.items():
        layers.append({"name": shape.name, "kind": "decode", "layer": key})
        prefill.append({"name": shape.name, "kind": "prefill", "layer": key})
    batches, requests = (BATCHES[:1], 3) if options.quick else (BATCHES, 200)
    generation = [{"name": f"OLMoE-1B-7B, batch {batch}", "batch": batch} for batch in batches]
    request = [{"name": "OLMoE-1B-7B, one request", "requests": requests}]
    # A case for each format: the programs of sixteen layers take most of a minute to compile.
    ours, request = (
        [
            case | {"name": f"{case['name']}, {format}", "format": format}
            for case in cases
            for format in FORMATS
        ]
        for cases in (generation, request)
    )
    of_layers, model = (program(options, "Switchyard", script, torch=False) for script in (LAYERS, MODEL))
    peer = program(options, "transformers", TRANSFORMERS, torch=True)
    return {
        "layers": [(of_layers, layers)],
        "prefill": [(of_layers, prefill)],
        "model": [(model, ours), (peer, generation)],
        "request": [(model, request)],
    }


def joined(before: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Results, and those of the parts that only an earlier run on such a card measured."""
    if before["gpu"] != results["gpu"]:
        return results
    measured = {told["part"] for told in results["programs"]}
    others = [told for told in before["programs"] if told["part"] not in measured]
    return results | {"programs": [*others, *results["programs"]]}


if __name__ == "__main__":
    run_main(main)
