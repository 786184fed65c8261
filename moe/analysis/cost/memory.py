"""The memory that training and serving need, over all chips together."""

import math
from dataclasses import dataclass

import jax

from moe.analysis.cost.matrices import entering, matrices
from moe.analysis.cost.passes import kv_bytes
from moe.nn import TransformerConfig, structure
from moe.nn.pattern import repeats
from moe.optim import Optimizer

LOGIT_BYTES = 4 + 2  # float32, and their gradient in bfloat16


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a train step. All is split over the chips without a rest, nothing is held twice."""

    parameters: float
    """Float32."""

    optimizer: float
    """Moments, as the optimizer makes them."""

    average: float
    """Of the parameters, where the run keeps one."""

    cast: float
    """Parameters in compute precision."""

    gradients: float
    """Float32."""

    activations: float
    """What backward needs of the forward pass of one micro-batch, by `remat`."""

    logits: float
    """Of one chunk of the loss, and their gradient."""

    accumulated: bool
    """Whether gradients are there while activations are at their most; else they come as those go."""

    @property
    def state(self) -> float:
        """What is held from step to step."""
        return self.parameters + self.optimizer + self.average

    @property
    def total(self) -> float:
        """At the most."""
        passing = (self.gradients, self.activations)
        return self.state + self.cast + self.logits + (sum(passing) if self.accumulated else max(passing))


def training_memory(
    config: TransformerConfig,
    optimizer: Optimizer,
    *,
    tokens: int,
    length: int,
    accumulation: int = 1,
    loss_chunks: int = 1,
    average: bool = False,
) -> TrainingMemory:
    """What a train step holds at its most.

    Args:
        config: the model.
        optimizer: its state is read off the shapes that it makes.
        tokens: of a micro-batch.
        length: of a sequence.
        accumulation: micro-batches.
        loss_chunks: parts in which the loss is made.
        average: whether a moving average of the parameters is kept.
    """
    _, shapes = structure(config)
    moments = jax.eval_shape(optimizer.build(shapes, 1).init, shapes)
    params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return TrainingMemory(
        parameters=4.0 * params,
        optimizer=float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(moments))),
        average=4.0 * params * average,
        cast=2.0 * params,
        gradients=4.0 * params,
        activations=tokens * activation_bytes(config, length),
        logits=tokens / loss_chunks * config.vocab_size * LOGIT_BYTES,
        accumulated=accumulation > 1,
    )


def activation_bytes(config: TransformerConfig, length: int) -> float:
    """Bytes that backward needs of one token's forward pass, bfloat16.

    none keeps both residual streams and what the norms make of them, queries, keys, values, attention's
    result, gate, up and their product; dots the residual streams and the results of products with parameters;
    full the input of each scanned unit, and in one unit at a time all that none keeps.
    """
    if config.remat == "full":
        stacks = repeats(config.layers)
        within = max(sum(_kept(config, kind, length, "none") for kind in unit) for unit, _ in stacks)
        return sum(count for _, count in stacks) * 2.0 * config.width + within
    return sum(_kept(config, kind, length, config.remat) for kind in config.layers)


def _kept(config: TransformerConfig, kind: str, length: int, remat: str) -> float:
    attention, moe = config.attention, config.moe
    entered = entering(config, config.layers.index(kind), length)
    projected = attention.projected_width
    attended = attention.heads * attention.value_width
    if kind.upper() == "M":
        width = sum(number * width for number, width in moe.width_classes) / moe.num_experts
        routed = moe.experts_per_token(length, training=True)
        hidden, results = routed * width + moe.shared_hidden, (routed + 1) * config.width
    else:
        hidden, results = config.dense_width, config.width
    if remat == "dots":
        numbers = 2 * config.width + projected + 2 * hidden + results
    else:
        numbers = 4 * config.width + projected + attended + 3 * hidden
    return 2.0 * numbers * entered


def weights_memory(config: TransformerConfig, weights: str) -> float:
    """Bytes of all parameters as they are served, in a format of `Matrices.stored`."""
    return sum(m.count * m.stored(weights) for m in matrices(config))


def serving_memory(
    config: TransformerConfig, weights: str, batch: int, context: int, cache: str = "bfloat16"
) -> float:
    """Bytes of weights and of the cache of `batch` sequences."""
    return weights_memory(config, weights) + batch * kv_bytes(config, context, cache)
