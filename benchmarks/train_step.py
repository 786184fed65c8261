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
part of the model (`benchmarks/gpu/kernel_time.py`).

Fields of the config can be set as with `train.py`. Results go to `benchmarks/results/train_step_GPU.json` and
`docs/results/train_step_GPU.md`.
"""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.gpu.command import gpu
from benchmarks.gpu.kernel_time import KernelTimes, kernel_times
from benchmarks.gpu.train_step_report import page
from benchmarks.provenance import provenance
from benchmarks.worker import ROOT
from moe.analysis.compute import account, data_sheet_peak
from moe.config import load_config, override
from moe.errors import one_line, run_main
from moe.experiment import Experiment
from moe.mesh import make_mesh
from moe.nn import structure
from moe.training.evaluate import to_devices
from moe.training.state import initial_state
from moe.training.step import make_train_step

WARM_UP = 3  # steps before the first that is timed
WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 10**6}  # kernels that a CUDA graph must have at least


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
    results |= measure(
        experiment, 2 if options.quick else options.steps, 0 if options.quick else options.profiled
    )
    print(page(results))
    if options.out or not options.quick:
        card = "_".join(jax.devices()[0].device_kind.lower().replace("nvidia", "").split()[:1])
        out = options.out or ROOT / "benchmarks" / "results" / f"train_step_{card}.json"
        beside = out.parent if options.out else ROOT / "docs" / "results"
        write(out, json.dumps(results, indent=1) + "\n")
        write(beside / f"{out.stem}.md", page(results))


def measure(experiment: Experiment, steps: int, profiled: int) -> dict[str, Any]:
    """Seconds of each step, memory, and the profile of a few steps more."""
    model, settings = experiment.model, experiment.train
    mesh = make_mesh(experiment.mesh)
    jax.set_mesh(mesh)
    experiment.check_devices(jax.device_count())
    graph, shapes = structure(model)
    transformation = experiment.optimizer.build(shapes, settings.steps)
    train_step = make_train_step(
        graph, transformation, accumulation=settings.accumulation, chunks=settings.loss_chunks
    )
    key = jax.random.key(experiment.seed)
    state = initial_state(model, transformation, seed=experiment.seed, average=False)
    shape = (settings.batch_size, experiment.data.sequence_length + 1)
    tokens = to_devices(np.random.default_rng(0).integers(model.vocab_size, size=shape, dtype=np.int32))
    slices = to_devices(np.zeros(shape[0], np.int32))

    started = time.perf_counter()
    lowered = train_step.lower(state, key, tokens, slices, 1)
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - started

    def step(program=compiled):
        nonlocal state
        state, metrics = program(state, key, tokens, slices)
        return metrics

    first = float(step()["loss"])
    seconds, last = seconds_of_steps(step, steps)
    compute, device = account(model, experiment.data.sequence_length), mesh.devices.flat[0]
    peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "versions": {"jax": jax.__version__},
        "shape": shape_of(experiment),
        "devices_used": mesh.size,
        "parameters": compute.total_params,
        "active_parameters": compute.active_params,
        "flops_of_a_token": compute.training_flops,
        "tokens_of_a_step": settings.batch_size * experiment.data.sequence_length,
        "peak": data_sheet_peak(device.device_kind),
        "compile_seconds": compile_seconds,
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "loss": [first, last],
        "profile": profile_record(step, lowered, compiled, profiled) if profiled else None,
    }


def seconds_of_steps(step, steps: int) -> tuple[list[float], float]:
    """Seconds between the ends of consecutive steps, and the loss at the last."""
    running, ends = step(), []
    for _ in range(WARM_UP + steps):
        waiting, running = running, step()
        jax.block_until_ready(waiting)
        ends.append(time.perf_counter())
    loss = float(running["loss"])
    return np.diff(ends)[-steps:].tolist(), loss


def profile(step, program, count: int) -> KernelTimes:
    """Every kernel's time in `count` steps of a compiled program."""
    jax.block_until_ready(step(program))
    only_device = jax.profiler.ProfileOptions()
    only_device.host_tracer_level = only_device.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=only_device):
            for _ in range(count):
                metrics = step(program)
            jax.block_until_ready(metrics)
        return kernel_times(Path(folder), program.as_text())


def profile_record(step, lowered, compiled, steps: int) -> dict[str, Any]:
    """The profile as JSON, by step: all parts, and the kernels that make up 99 % of the time."""
    try:
        whole = profile(step, compiled, steps)
        times = profile(step, lowered.compile(WITHOUT_GRAPHS), steps)
    except Exception as error:  # the figures above hold without it
        return {"failed": one_line(f"{type(error).__name__}: {error}")}
    kernels, reached = [], 0.0
    for kernel in times.kernels:
        if reached > 0.99 * times.busy:
            break
        reached += kernel.seconds
        kernels.append(asdict(kernel) | {"seconds": kernel.seconds / steps, "calls": kernel.calls / steps})
    return {
        "span": whole.span / steps,
        "idle": (whole.span - whole.busy) / steps,
        "busy": times.busy / steps,
        "parts": {part: seconds / steps for part, seconds in times.by_part().items()},
        "kernels": kernels,
    }


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
