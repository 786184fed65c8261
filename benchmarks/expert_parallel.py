"""Expert parallelism on several GPUs of one host: every exchange against the same work without communication.

    uv run benchmarks/expert_parallel.py
    uv run benchmarks/expert_parallel.py --exchanges gather all-to-all --chunks 2 --shapes mixtral
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
        uv run benchmarks/expert_parallel.py --quick

Of n devices along `expert` each has T tokens and E / n experts. The same work without communication is that
of one device: T tokens whose experts are all among E / n. Measured are a whole MoE layer (router, dispatch,
SwiGLU experts, combine; bfloat16, random data and so nearly even use), forward and with the gradients of
tokens and parameters, for each exchange and number of chunks; then whole train steps of a few layers, with
the exchange that was fastest for the layer. Their parameters, but for the experts, are stored in parts, so a
train step also pays for gathering those.

`benchmarks/gpu/expert_parallel_jax.py` measures, `benchmarks/gpu/timing.py` says how a time is taken; figures
are medians. Results go to `benchmarks/results/expert_parallel_GPU.json` and
`docs/results/expert_parallel_GPU.md`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.gpu.command import card, gpu, write
from benchmarks.gpu.expert_parallel_jax import ALONE, EXCHANGES, ExchangeName, layers, train_steps
from benchmarks.gpu.expert_parallel_report import page
from benchmarks.gpu.shapes import LAYERS, LayerName
from benchmarks.provenance import provenance
from benchmarks.worker import ROOT
from moe.errors import UserError, run_main


@dataclass(frozen=True)
class Options:
    """What to measure, and where to keep it."""

    shapes: tuple[LayerName, ...] = ("olmoe", "mixtral")
    """Layers that are measured."""

    exchanges: tuple[ExchangeName, ...] = ("gather", "all-to-all")
    """How tokens travel; `ragged` is there, too, which takes long on GPUs."""

    chunks: tuple[int, ...] = (1, 2, 4)
    """Parts in which they do."""

    devices: int = 0
    """Devices along `expert`; 0 takes all."""

    rounds: int = 3
    """Rounds, each of at least 20 calls, over which medians are taken."""

    train: bool = True
    """Measure train steps, too."""

    limit: float = 210
    """Seconds for everything. What is not begun by then is left out, and the results say so."""

    out: Path | None = None
    """Where results go, as JSON, with a page of the same name beside it; by default as said above."""

    render: Path | None = None
    """Measure nothing: write the page in docs of these kept results."""

    commit: str = ""
    """The commit, for a copy of the tree that has no repository; a + behind it says that files differ."""

    quick: bool = False
    """A trial: tiny shapes, one round, nothing kept."""


def main() -> None:
    """Measure, print and keep."""
    options = tyro.cli(Options, description=__doc__)
    if options.render:
        results = json.loads(options.render.read_text())
        write(ROOT / "docs" / "results" / f"{options.render.stem}.md", page(results))
        return
    results = measure(options)
    print(page(results))
    if options.quick and not options.out:
        return
    out = options.out or ROOT / "benchmarks" / "results" / f"expert_parallel_{card(results)}.json"
    write(out, json.dumps(results, indent=1) + "\n")
    beside = out.parent if options.out else ROOT / "docs" / "results"
    write(beside / f"{out.stem}.md", page(results))


def measure(options: Options) -> dict[str, Any]:
    """Records of all layers, then of all train steps."""
    count = options.devices or jax.device_count()
    if not 2 <= count <= jax.device_count():
        raise UserError(f"devices={count}: there are {jax.device_count()}, and two at least are needed")
    deadline, records = time.monotonic() + options.limit, []
    fastest, rounds = {}, 1 if options.quick else options.rounds
    for name in options.shapes:
        shape = LAYERS[name].shrunk() if options.quick else LAYERS[name]
        found = layers(
            shape,
            count,
            [(EXCHANGES[exchange], chunks) for exchange in options.exchanges for chunks in options.chunks],
            rounds,
            deadline,
        )
        records += found
        timed = [r for r in found if r.get("pass") == "forward + backward" and r["exchange"] != ALONE]
        fastest[shape] = min(timed, key=lambda r: min(r["seconds"]), default=None)
    for shape, record in fastest.items() if options.train else ():
        if record:
            records += train_steps(shape, count, record, deadline, quick=options.quick)
    results = provenance() | {"gpu": gpu(), "devices": count, "rounds": rounds, "records": records}
    results |= {"versions": {"jax": jax.__version__}, "device": jax.devices()[0].device_kind}
    if options.commit:
        results |= {"commit": options.commit.removesuffix("+"), "modified": options.commit.endswith("+")}
    return results


if __name__ == "__main__":
    run_main(main)
