"""Everything that a training run carries from step to step, and how it is made on the mesh."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from moe.mesh import abstract
from moe.nn import Transformer, TransformerConfig, build
from moe.nn.quantized import quantize_params
from moe.quant import format_named

StartingPoint = Callable[[nnx.State, nnx.State], tuple[nnx.State, nnx.State]]
"""From the parameters and the controllers' state of a fresh model to those that a run starts with."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A pytree; checkpoints hold exactly this and the data position."""

    step: Int[Array, ""]
    """Steps taken, skipped ones included."""

    params: nnx.State
    """Trained parameters, float32."""

    controllers: nnx.State
    """State of balance controllers and routing strategies."""

    optimizer: Any
    """State of the optax transformation."""

    average: nnx.State | None
    """Exponential moving average of the parameters; None where it is off."""

    skipped: Int[Array, ""]
    """Steps skipped because loss or gradient was not finite."""

    skipped_in_a_row: Int[Array, ""]
    """How many of them came last, one after the other."""

    @property
    def evaluated(self) -> nnx.State:
        """The parameters that evaluation uses: the average where there is one."""
        return self.params if self.average is None else self.average


def split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model's structure, its parameters and the state of its controllers."""
    graph, params, controllers = nnx.split(model, nnx.Param, ...)
    return graph, params, controllers


def initial_state(
    config: TransformerConfig,
    transformation: optax.GradientTransformation,
    *,
    seed: int,
    average: bool,
    start: StartingPoint | None = None,
) -> TrainState:
    """A fresh state on the mesh that is set; `start` makes its parameters from random ones."""
    _, params, controllers = split(build(config, jax.random.key(seed)))
    if start is not None:
        params, controllers = start(params, controllers)

    def make(params):
        zero = jnp.zeros((), jnp.int32)
        copy = jax.tree.map(jnp.copy, params) if average else None
        return zero, transformation.init(params), copy, zero + 0, zero + 0

    step, optimizer, copy, skipped, in_a_row = jax.jit(make)(params)
    return TrainState(step, params, controllers, optimizer, copy, skipped, in_a_row)


def abstract_state(
    config: TransformerConfig, transformation: optax.GradientTransformation, *, average: bool
) -> TrainState:
    """Shapes, dtypes and shardings of the state, at no cost: what a checkpoint is restored into."""
    return abstract(lambda: initial_state(config, transformation, seed=0, average=average))


def abstract_evaluated(config: TransformerConfig, *, average: bool, weights: str = "") -> TrainState:
    """`abstract_state` of what an evaluation needs, and no more; the rest is None or empty.

    Of the parameters that is `TrainState.evaluated`, or where a run holds quantised weights
    (`Quantization.weights`) these.
    """
    state = abstract_state(config, optax.identity(), average=average and not weights)
    if weights:
        format = format_named(weights)
        return replace(state, params=abstract(lambda: quantize_params(state.params, format, config.dtype)))
    return replace(state, params=None) if average else state
