"""Speed of whole train steps on a GPU, and a profile that says where the time goes.

    uv run benchmarks/train_step.py
    uv run benchmarks/train_step.py --config configs/olmoe_1b_7b.py --model.layers 4*"M" --train.batch-size 8
    uv run benchmarks/train_step.py --quick --config configs/quickstart.py

Forward, backward, clipping, AdamW, balance losses and all metrics of a run, on random tokens and fresh
parameters. The next step is enqueued before the last has ended, as in `train.py`; the time of a step is that
between the ends of two, and the figure its median. MFU is the share of the device's data-sheet peak that the
model's own operations take (`moe/analysis/compute.py`: routed experts by the K of E that a token visits,
attention by half the square, nothing for recomputation).

Then some steps are profiled: once as they are, for the time in which no kernel runs, and once compiled
without CUDA graphs, whose kernels do not say what they belong to, for the time of every kernel, summed by
part of the model (`moe/analysis/profile`).

Fields of the config can be set as with `train.py`. Results go to `benchmarks/results/train_step_GPU.json` and
`docs/results/train_step_GPU.md`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.gpu.command import gpu
from benchmarks.gpu.train_step_report import page
from benchmarks.provenance import provenance
from benchmarks.worker import ROOT
from moe.config import load_config, override
from moe.errors import run_main
from moe.evaluation.train_step import measure_train_step
from moe.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """What to measure, and where to keep it; fields of the config may follow."""

    config: str = "configs/olmoe_3b_h100.py"
    """The config whose model, batch and optimizer are measured."""

    steps: int = 24
    """Steps over which the median is taken."""

    profiled: int = 3
    """Steps that are profiled after those; 0 leaves the profile out."""

    out: Path | None = None
    """Where results go, as JSON, with a page of the same name beside it. By default
    benchmarks/results/train_step_GPU.json and docs/results/train_step_GPU.md."""

    render: Path | None = None
    """Measure nothing: make the page of docs/results of these kept results."""

    commit: str = ""
    """The commit, for a copy of the tree that has no repository; a + behind it says that files differ."""

    quick: bool = False
    """A trial: two steps, no profile, nothing kept."""


def main() -> None:
    """Measure, print and keep."""
    options, rest = tyro.cli(Options, description=__doc__, return_unknown_args=True)
    if options.render:
        write(
            ROOT / "docs" / "results" / f"{options.render.stem}.md",
            page(json.loads(options.render.read_text())),
        )
        return
    experiment, description = load_config(options.config, Experiment)
    experiment = override(experiment, rest, prog="train_step.py", description=description)
    results = provenance() | {"gpu": gpu(), "config": options.config, "overrides": rest}
    if options.commit:
        results |= {"commit": options.commit.removesuffix("+"), "modified": options.commit.endswith("+")}
    results |= {"versions": {"jax": jax.__version__}, "shape": shape_of(experiment)}
    results |= measure_train_step(
        experiment, 2 if options.quick else options.steps, 0 if options.quick else options.profiled
    )
    print(page(results))
    if options.out or not options.quick:
        card = "_".join(jax.devices()[0].device_kind.lower().replace("nvidia", "").split()[:1])
        out = options.out or ROOT / "benchmarks" / "results" / f"train_step_{card}.json"
        beside = out.parent if options.out else ROOT / "docs" / "results"
        write(out, json.dumps(results, indent=1) + "\n")
        write(beside / f"{out.stem}.md", page(results))


def shape_of(experiment: Experiment) -> dict[str, Any]:
    """What the page says of the model and its batch."""
    model, train = experiment.model, experiment.train
    return {
        "sequences": train.batch_size,
        "sequence_length": experiment.data.sequence_length,
        "accumulation": train.accumulation,
        "loss_chunks": train.loss_chunks,
        "layers": model.layers,
        "width": model.width,
        "num_experts": model.moe.num_experts,
        "expert_width": model.moe.expert_width,
        "experts_per_token": model.moe.routing.experts_per_token(model.moe.num_experts),
        "vocab_size": model.vocab_size,
        "compute_dtype": model.compute_dtype,
        "remat": model.remat,
        "unroll": model.unroll,
        "optimizer": repr(experiment.optimizer),
    }


def write(path: Path, text: str) -> None:
    """A file, and the folders around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    run_main(main)
