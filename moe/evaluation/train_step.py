"""The speed of whole train steps: forward, backward, update, balance losses and all metrics of a run."""

import time
from typing import Any

import jax
import numpy as np

from moe.analysis.compute import account
from moe.analysis.hardware import data_sheet_peak
from moe.analysis.profile import kernels_launched
from moe.evaluation.steps import profile_record, seconds_between_ends
from moe.experiment import Experiment
from moe.mesh import make_mesh
from moe.nn import structure
from moe.training.evaluate import to_devices
from moe.training.state import initial_state
from moe.training.step import make_train_step


def measure_train_step(experiment: Experiment, steps: int, profiled: int) -> dict[str, Any]:
    """Seconds of each step, memory, and the profile of a few steps more, on fresh parameters.

    Tokens are random. The mesh is the experiment's, over all devices, and stays set.

    Args:
        experiment: what is trained.
        steps: that are timed.
        profiled: that are profiled after those; 0 leaves the profile out.
    """
    model, settings = experiment.model, experiment.train
    mesh = make_mesh(experiment.mesh)
    jax.set_mesh(mesh)
    experiment.check_devices(jax.device_count())
    graph, shapes = structure(model)
    transformation = experiment.optimizer.build(shapes, settings.steps)
    train_step: Any = make_train_step(
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

    metrics = {}

    def step(program=compiled):
        nonlocal state, metrics
        state, metrics = program(state, key, tokens, slices)
        return metrics

    first = float(step()["loss"])
    seconds = seconds_between_ends(step, steps)
    last = float(metrics["loss"])
    compute, device = account(model, experiment.data.sequence_length), mesh.devices.flat[0]
    peak_bytes = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
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
        "kernels": kernels_launched(compiled.as_text()),
        "profile": profile_record(step, lowered, compiled, profiled) if profiled else None,
    }
