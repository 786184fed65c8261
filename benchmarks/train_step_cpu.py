"""Measured program: whole train steps of Switchyard on random tokens.

See `worker.py` for how it is run.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.peers.qwen3_moe import routed_as_qwen3
from benchmarks.worker import Task, Work, seconds_of, serve
from moe.config import load_config
from moe.experiment import Experiment
from moe.mesh import make_mesh
from moe.nn import structure
from moe.optim import AdamW
from moe.training.evaluate import to_devices
from moe.training.state import initial_state
from moe.training.step import make_train_step


def prepare(task: Task) -> tuple[dict[str, Any], Work]:
    """Compile the step of the config's model with AdamW and take steps as asked."""
    experiment, _ = load_config(task["config"], Experiment)
    model = dataclasses.replace(routed_as_qwen3(experiment.model), compute_dtype=task["dtype"])
    jax.set_mesh(make_mesh(experiment.mesh))
    graph, shapes = structure(model)
    transformation = AdamW().build(shapes, steps=1000)
    train_step = make_train_step(
        graph,
        transformation,
        accumulation=experiment.train.accumulation,
        chunks=experiment.train.loss_chunks,
    )
    key = jax.random.key(0)
    state = initial_state(model, transformation, seed=0, average=False)
    shape = (experiment.train.batch_size, experiment.data.sequence_length + 1)
    tokens = to_devices(np.random.default_rng(0).integers(model.vocab_size, size=shape, dtype=np.int32))
    slices = to_devices(np.zeros(shape[0], np.int32))

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, key, tokens, slices, 1)
        jax.block_until_ready((state, metrics))

    compile_seconds = seconds_of(step)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    ready = {
        "parameters": parameters,
        "compile_seconds": compile_seconds,
        "versions": {"jax": jax.__version__},
    }
    return ready, lambda steps: {"seconds": [seconds_of(step) for _ in range(steps)]}


if __name__ == "__main__":
    serve(prepare)
