"""What the commands that measure on a GPU share: options, hardware, programs one after the other, results."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.cases import Program, measure
from benchmarks.gpu.decode_report import decode_page, decode_summary
from benchmarks.gpu.report import grouped_matmul_page, moe_layer_page
from benchmarks.gpu.summary import grouped_matmul_summary, moe_layer_summary, with_summary
from benchmarks.provenance import provenance
from benchmarks.worker import ROOT

PAGES = {
    "decode": (decode_page, decode_summary),
    "grouped_matmul": (grouped_matmul_page, grouped_matmul_summary),
    "moe_layer": (moe_layer_page, moe_layer_summary),
}


@dataclass(frozen=True)
class Common:
    """What to measure, and where to keep it."""

    out: Path | None = None
    """Where results go, as JSON, with a page of the same name beside it; by default to
    benchmarks/results/NAME_GPU.json, docs/results/NAME_GPU.md and docs/performance.md."""

    render: Path | None = None
    """Measure nothing: write the pages in docs of these kept results, NAME_GPU.json."""

    rounds: int = 5
    """Rounds, each of at least 20 calls, over which medians are taken."""

    limit: float = 270
    """Seconds for everything. Cases not begun by then are left out, and the results say so."""

    commit: str = ""
    """The commit, for a copy of the tree that has no repository; a + behind it says that files differ."""

    peer_python: Path = Path(sys.executable)
    """Interpreter of the peers that run on torch."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is for a trial."""

    quick: bool = False
    """A trial: tiny shapes, two rounds, nothing kept."""


def run(options: Common, work: Sequence[tuple[Program, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """Results of all programs with their cases, one after the other: none holds memory while another runs."""
    deadline = time.monotonic() + options.limit
    results = provenance() | {"gpu": gpu(), "rounds": options.rounds, "programs": []}
    if options.commit:
        results |= {"commit": options.commit.removesuffix("+"), "modified": options.commit.endswith("+")}
    for program, cases in work:
        started = time.monotonic()
        told = measure(program, cases, limit=150, deadline=deadline)
        results["programs"].append(told | {"wall_seconds": round(time.monotonic() - started, 1)})
    return results


def program(options: Common, name: str, script: str, *, torch: bool, **task: Any) -> Program:
    """A program with what all are told, in the environment that its framework needs."""
    rounds = 2 if options.quick else options.rounds
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": options.device}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return Program(
        name,
        script,
        python=options.peer_python if torch else Path(sys.executable),
        path=tuple(Path(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder),
        environment=environment,
        task={"rounds": rounds, "quick": options.quick} | task,
    )


def gpu() -> dict[str, str]:
    """Name, memory, driver and power limit of the first GPU; empty where there is none."""
    fields = ("name", "memory.total", "driver_version", "power.limit")
    if not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    told = subprocess.run(query, capture_output=True, text=True)
    values = told.stdout.strip().split(", ")
    return dict(zip(fields, values, strict=True)) if told.returncode == 0 else {}


def keep(options: Common, name: str, results: dict[str, Any]) -> None:
    """Print the page; write it and the results, unless this was a trial that names no file."""
    page, _ = PAGES[name]
    print(page(results))
    if options.quick and not options.out:
        return
    if options.out:
        write(options.out.with_suffix(".md"), page(results))
    out = results_file(options, name, results)
    write(out, json.dumps(results, indent=1) + "\n")
    if not options.out:
        render(out, name)


def results_file(options: Common, name: str, results: dict[str, Any]) -> Path:
    """Where results go."""
    return options.out or ROOT / "benchmarks" / "results" / f"{name}_{card(results)}.json"


def render(kept: Path, name: str) -> None:
    """Write the page of kept results to docs/results, and their summary into docs/performance.md."""
    page, summary = PAGES[name]
    results = json.loads(kept.read_text())
    write(ROOT / "docs" / "results" / f"{kept.stem}.md", page(results))
    performance = ROOT / "docs" / "performance.md"
    write(performance, with_summary(performance.read_text(), kept.stem, summary(results)))


def card(results: dict[str, Any]) -> str:
    """Short name of the GPU."""
    words = results["gpu"].get("name", "").lower().replace("nvidia", "").split()
    return words[0] if words else "none"


def write(path: Path, text: str) -> None:
    """Write a file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
