"""The train step for a topology, and the FLOPs that it should cost."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moe.analysis.compute import account, by_component
from moe.experiment import Experiment
from moe.kernels.attention import block_length, splash_cuts
from moe.mesh import spec
from moe.nn import structure
from moe.training.state import abstract_state
from moe.training.step import make_train_step
from tpu.lowered import Lowered, Serving
from tpu.operations import EvenLoads


def check_training(experiment: Experiment, _: Serving, count: int) -> None:
    """Refuse a batch or a model that so many devices cannot share.

    Raises:
        UserError: one line naming the field.
    """
    experiment.check_devices(count)


def train(experiment: Experiment, _: Serving) -> Lowered:
    """The very step that `train.py` runs, on the mesh that is set."""
    mesh = jax.sharding.get_mesh()
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
    batch = jax.sharding.NamedSharding(mesh, spec("batch"))
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
        costs.training_flops * count,
        (costs.training_flops + recomputed(experiment)) * count,
        even_loads(experiment, count // settings.accumulation),
    )


def recomputed(experiment: Experiment) -> float:
    """FLOPs a token of a train step beyond three times the forward pass.

    Whole layers that are computed again (`remat="full"`), but for the last product of a feed-forward that
    every token enters: nothing of the backward pass reads its result. The pass that counts first, where a
    balance loss needs the whole of an accumulated batch. And what attention computes beyond half the square
    of pairs.
    """
    model, sequence = experiment.model, experiment.data.sequence_length
    parts = by_component(model, sequence)
    again = 1 if model.remat == "full" else 0
    first = 1 if model.counts_first(experiment.train.accumulation) else 0
    layers = sum(
        part.forward_flops * (first + again * (2 / 3 if name in ("dense", "shared experts") else 1.0))
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
    passes = 1 + first + again
    attention = product * ((2 * passes + backward) * share - (2 + passes) * counted)
    return layers + attention


def even_loads(experiment: Experiment, tokens: int) -> EvenLoads:
    """What a device's grouped products do if every expert has as many tokens, padded to whole tiles.

    Args:
        experiment: whose model it is.
        tokens: of a micro-batch, over all devices.
    """
    moe, axes = experiment.model.moe, jax.sharding.get_mesh().shape
    if not experiment.model.moe_layers:
        return EvenLoads(0.0)
    # Devices along `expert` bring their tokens together, those along `tensor` hold the same ones.
    split, same = axes["expert"], axes["tensor"]
    gathered = tokens / math.prod(axes.values()) * split * same
    of_expert = gathered * moe.experts_per_token(experiment.data.sequence_length) / moe.num_experts
    tile = getattr(moe.dispatch, "tile", 1)
    return EvenLoads(math.ceil(of_expert / tile) * tile * moe.num_experts / split)
