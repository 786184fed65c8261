"""The steps that can be compiled for a topology, and the FLOPs that each of them should cost.

Nothing is allocated: states and batches are shapes with shardings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.analysis.compute import account, by_component
from moe.experiment import Experiment
from moe.kernels.attention import block_length, splash_cuts
from moe.mesh import spec
from moe.nn import structure
from moe.training.state import abstract_state
from moe.training.step import make_train_step


@dataclass(frozen=True)
class Lowered:
    """A step, ready to compile."""

    program: jax.stages.Lowered

    held: dict[str, Any]
    """What stays on the devices between steps, by kind: pytrees of shapes with shardings."""

    tokens: int
    """Taken in one run, over all devices."""

    passes_tokens: int
    """Taken at once: those of a micro-batch."""

    model_flops: float
    """What the model itself costs, over all devices: MFU counts these."""

    expected_flops: float
    """The same with all that is computed a second time, knowingly: what the program should cost."""


def train(experiment: Experiment) -> Lowered:
    """The very step that `train.py` runs, on the mesh that is set."""
    settings, sequence = experiment.train, experiment.data.sequence_length
    graph, shapes = structure(experiment.model)
    transformation = experiment.optimizer.build(shapes, settings.steps)
    step: Any = make_train_step(
        graph,
        transformation,
        accumulation=settings.accumulation,
        chunks=settings.loss_chunks,
        average_decay=settings.average_decay,
    )
    state = abstract_state(experiment.model, transformation, average=settings.average_decay > 0)
    batch = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch"))
    tokens = jax.ShapeDtypeStruct((settings.batch_size, sequence + 1), jnp.int32, sharding=batch)
    slices = jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32, sharding=batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    held = {"parameters": state.params, "optimizer": state.optimizer, "average": state.average}
    count = settings.batch_size * sequence
    costs = account(experiment.model, sequence)
    return Lowered(
        step.lower(state, key, tokens, slices, 1),
        held,
        count,
        count // settings.accumulation,
        costs.training_flops * count,
        (costs.training_flops + recomputed(experiment)) * count,
    )


@dataclass(frozen=True)
class StepKind:
    """One of the programs that a run consists of."""

    lower: Callable[[Experiment], Lowered]
    """Traces it for the mesh that is set."""

    what: str
    """A few words for `--help`."""


STEPS = {"train": StepKind(train, "forward, backward, optimizer and metrics of one batch")}


def recomputed(experiment: Experiment) -> float:
    """FLOPs a token of a train step beyond three times the forward pass.

    Whole layers that are computed again (`remat="full"`), but for the last product of a feed-forward that
    every token enters: nothing of the backward pass reads its result. And what attention computes beyond half
    the square of pairs.
    """
    model, sequence = experiment.model, experiment.data.sequence_length
    parts = by_component(model, sequence)
    again = 1 if model.remat == "full" else 0
    layers = sum(
        part.forward_flops * (2 / 3 if name in ("dense", "shared experts") else 1.0)
        for name, part in parts.items()
        if name not in ("embedding", "head")
    )
    heads, width = model.attention.heads, model.attention.head_width
    product = len(model.layers) * 2 * heads * width * sequence / 2  # one, of half the pairs of all layers
    # Splash attention makes the scores again in each of its two backward kernels: seven products, not four.
    # It leaves out blocks of pairs wholly ahead; XLA leaves out none.
    splash = splash_cuts(sequence, width)
    backward, share = (7, 1 + block_length(sequence) / sequence) if splash else (4, 2.0)
    # `by_component` counts two, the second over values, which kernels pad to the width of keys.
    counted = 1 + model.attention.value_width / width
    attention = product * ((2 + 2 * again + backward) * share - 3 * counted)
    return again * (layers - counted * product) + attention


def device_bytes(shapes: Any) -> int:
    """Bytes of a pytree of shapes with shardings on one device."""
    leaves = jax.tree.leaves(shapes)
    return sum(int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in leaves)


def balanced_rows(experiment: Experiment, lowered: Lowered, mesh: jax.sharding.Mesh) -> float:
    """Rows of experts on one device where every expert has as many tokens, padded to whole tiles."""
    moe = experiment.model.moe
    if not experiment.model.moe_layers:
        return 0.0
    # Devices along `expert` bring their tokens together, those along `tensor` hold the same ones.
    split, same = mesh.shape["expert"], mesh.shape["tensor"]
    gathered = lowered.passes_tokens / mesh.size * split * same
    of_expert = gathered * moe.experts_per_token(experiment.data.sequence_length) / moe.num_experts
    tile = getattr(moe.dispatch, "tile", 1)
    return float(np.ceil(of_expert / tile) * tile * moe.num_experts / split)
