"""How a compiled step is timed and profiled: back to back, the next enqueued before the last has ended."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe.analysis.profile import KernelTimes, kernel_times
from moe.errors import one_line

WARM_UP = 3  # steps before the first that is timed
WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 10**6}  # kernels that a CUDA graph must have at least
TOLD = 0.99  # of the time, by the kernels that a record names

Step = Callable[..., Any]
"""Runs a compiled program on what its last run left behind, and returns what can be waited for."""


def seconds_between_ends(step: Step, steps: int) -> list[float]:
    """Seconds between the ends of consecutive steps."""
    running, ends = step(), []
    for _ in range(WARM_UP + steps):
        waiting, running = running, step()
        jax.block_until_ready(waiting)
        ends.append(time.perf_counter())
    jax.block_until_ready(running)
    return np.diff(ends)[-steps:].tolist()


def profile(step: Step, program: Any, count: int) -> KernelTimes:
    """Every kernel's time in `count` steps of a compiled program."""
    jax.block_until_ready(step(program))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2 if jax.default_backend() == "cpu" else 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready([step(program) for _ in range(count)][-1])
        return kernel_times(Path(folder), program.as_text())


def profile_record(step: Step, lowered: Any, compiled: Any, calls: int, each: int = 1) -> dict[str, Any]:
    """The profile as JSON, by step: all parts, all kinds, and the kernels that make up most of the time.

    On a GPU it is taken twice: of the program as it is, for the time in which nothing runs, and compiled
    without CUDA graphs, whose kernels do not say what they belong to.

    Args:
        step: takes the program to run.
        lowered: the program before it was compiled.
        compiled: and after.
        calls: to profile.
        each: steps that a call takes.
    """
    try:
        whole = profile(step, compiled, calls)
        graphs = jax.default_backend() == "gpu"
        times = profile(step, lowered.compile(WITHOUT_GRAPHS), calls) if graphs else whole
    except Exception as error:  # what was timed holds without it
        return {"failed": one_line(f"{type(error).__name__}: {error}")}
    kernels, reached, steps = [], 0.0, calls * each
    for kernel in times.kernels:
        if reached > TOLD * times.busy:
            break
        reached += kernel.seconds
        kernels.append(asdict(kernel) | {"seconds": kernel.seconds / steps, "calls": kernel.calls / steps})
    return {
        "span": whole.span / steps,
        "idle": (whole.span - whole.busy) / steps,
        "busy": times.busy / steps,
        "parts": {part: seconds / steps for part, seconds in times.by_part().items()},
        "kinds": {kind: seconds / steps for kind, seconds in times.by_kind().items()},
        "kernels": kernels,
    }
