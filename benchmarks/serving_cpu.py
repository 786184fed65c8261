"""How fast our exports are served on this CPU: each engine with its formats, and our own decoder.

    uv run --extra onnx --extra gguf benchmarks/serving_cpu.py
    uv run --extra onnx --extra gguf benchmarks/serving_cpu.py --quick

One model (`benchmarks/serving/model.py`: 275M parameters, 48M of them active), random weights, exported by
`moe/export`. Timed are a prompt of 128 tokens and the 64 tokens behind it, one sequence, greedily: llama.cpp
(F16, Q8_0, Q4_K_M), onnxruntime-genai (float32, int8, int4), transformers (bfloat16, float32) and
`moe/decode`. Each program runs in a process of its own, on the same cores; they take turns, never two at
once.
A figure is the median over turns; a ratio, of a turn of a format with that of the engine's unquantised one.

Results go to `benchmarks/results/serving_cpu.json` and `docs/results/serving_cpu.md`, unless other programs
used the machine meanwhile. `--quick` is a trial of two turns, nothing kept.
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.cpu import MOST_FOR_OTHERS, hold_cores, keep, note
from benchmarks.peers.environment import peer_python
from benchmarks.provenance import Others, provenance
from benchmarks.serving.model import MODEL, write
from benchmarks.serving.report import markdown
from benchmarks.worker import ROOT, Worker, WorkerError
from moe.analysis.compute import account
from moe.errors import UserError, run_main
from moe.mesh import MeshConfig, make_mesh

PROMPT, NEW = 128, 64


@dataclass(frozen=True)
class Engine:
    """One that serves, and what it is given."""

    name: str
    """What it is called."""

    script: str
    """Its program, from the root of the repository."""

    requirements: str
    """Name of its environment; empty for ours."""

    exported: str
    """What it loads, as `export.py --to` has it; empty for nothing."""

    formats: tuple[str, ...]
    """As `export.py` and `eval.py` have them; the first is what the others are compared with."""


ENGINES = (
    Engine(
        "Switchyard",
        "benchmarks/serving/ours.py",
        "",
        "",
        ("bfloat16", "float32", "int8", "int8-dynamic", "int4"),
    ),
    Engine(
        "llama.cpp",
        "benchmarks/peers/serving_llama_cpp.py",
        "llama_cpp",
        "gguf",
        ("float16", "q8_0", "q4_k_m"),
    ),
    Engine(
        "onnxruntime-genai",
        "benchmarks/peers/serving_onnxruntime.py",
        "onnxruntime",
        "onnx",
        ("float32", "int8", "int4"),
    ),
    Engine(
        "transformers",
        "benchmarks/peers/serving_transformers.py",
        "transformers",
        "hf",
        ("bfloat16", "float32"),
    ),
)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    turns: int = 9
    """Turns over which medians are taken."""

    threads: int = 2
    """Cores that every program may use."""

    only: str = ""
    """A trial of one engine, by its name."""

    quick: bool = False
    """A trial of two turns, nothing kept."""


def main() -> None:
    """Measure, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    hold_cores(options.threads)
    jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    compute = account(MODEL, PROMPT)
    shape = {"prompt": PROMPT, "new": NEW, "threads": options.threads}
    results = provenance() | shape
    results |= {"parameters": compute.total_params, "active_parameters": round(compute.active_params)}
    engines = [engine for engine in ENGINES if options.only in ("", engine.name)]
    trial = options.quick or bool(options.only)
    others = Others()
    results["engines"] = measure(engines, shape, 2 if trial else options.turns)
    results["others_share"] = others.share()
    table = markdown(results)
    print(table)
    if trial:
        return
    if results["others_share"] > MOST_FOR_OTHERS:
        raise UserError(
            f"not kept: other programs took {results['others_share']:.0%} of the machine, which distorts the "
            "figures; run the same command when it is quiet"
        )
    keep(ROOT / "benchmarks" / "results" / "serving_cpu.json", json.dumps(results, indent=2) + "\n")
    keep(ROOT / "docs" / "results" / "serving_cpu.md", table)


def measure(engines: list[Engine], shape: dict[str, int], turns: int) -> list[dict[str, Any]]:
    """Seconds of every engine and format, turn by turn."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = [
            (engine, format, worker)
            for engine in engines
            for format, worker in start(engine, shape, folder, stack)
        ]
        for *_, worker in started:
            worker.ask(1)  # to warm up
        told = []
        for turn in range(turns):
            note(f"turn {turn + 1} of {turns}")
            told.append([worker.ask(1) for *_, worker in started])
    return [
        {"engine": engine.name, "format": format, "baseline": engine.formats[0]}
        | worker.ready
        | {name: [turn[i][name][0] for turn in told] for name in ("prefill", "decode")}
        | {name: told[-1][i][name] for name in ("different_tokens", "peak_bytes")}
        for i, (engine, format, worker) in enumerate(started)
    ]


def start(engine: Engine, shape: dict[str, int], folder: Path, stack: ExitStack):
    """The engine's program with each of its formats, ready."""
    python = Path(sys.executable)
    if engine.requirements:
        python = peer_python(ROOT / "benchmarks" / "peers" / f"{engine.requirements}.txt")
    for format in engine.formats:
        note(f"{engine.name}, {format}: starts")
        task = shape | {"vocabulary": MODEL.vocab_size, "precision": format}
        if engine.exported:
            task["path"] = str(write(folder, engine.exported, format))
        try:
            yield format, stack.enter_context(Worker(python, engine.script, task))
        except WorkerError as error:
            raise UserError(f"{engine.name} with {format}: {error}") from error


if __name__ == "__main__":
    run_main(main)
