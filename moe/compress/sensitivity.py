"""Which layers and which experts suffer most from quantisation: each by itself, the rest left as it is."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from moe.nn import TransformerConfig
from moe.nn.pattern import places
from moe.nn.quantized import fake_quantize_params
from moe.quant import Format

Divergence = Callable[[nnx.State], float]
"""Mean KL(unchanged || changed) of the next token under changed parameters, nats."""


@dataclass(frozen=True)
class Sensitivity:
    """Divergence from the unchanged model, nats a token, with the weights of one part rounded."""

    head: float
    """The output head."""

    layers: list[float]
    """[layers] All matrices of a layer."""

    experts: dict[int, list[float]]
    """For each MoE layer, by its number among all, the routed experts [E]."""


def sensitivity(
    params: nnx.State, format: Format, config: TransformerConfig, divergence: Divergence
) -> Sensitivity:
    """Round one part after the other; activations are never rounded.

    Args:
        params: trained ones.
        format: to round to.
        config: of the model.
        divergence: how far changed parameters lead away from `params`.
    """
    rounded = fake_quantize_params(params, format)
    mixed = jax.jit(lambda layer, expert: _mixed(params, rounded, config, layer, expert))
    layers = range(len(config.layers))
    return Sensitivity(
        head=0.0 if config.tied_embedding else divergence(mixed(HEAD_LAYER, ALL)),
        layers=[divergence(mixed(layer, ALL)) for layer in layers],
        experts={
            layer: [divergence(mixed(layer, expert)) for expert in range(config.moe.num_experts)]
            for layer in layers
            if config.layers[layer].upper() == "M"
        },
    )


HEAD_LAYER, ALL = -1, -1


def _mixed(params: nnx.State, rounded: nnx.State, config: TransformerConfig, layer, expert) -> nnx.State:
    """The parameters, rounded in one layer, or in one expert of it."""

    def one(path, plain, other):
        return jnp.where(_taken(path, plain, config, layer, expert), other, plain)

    flat = nnx.to_flat_state(params), nnx.to_flat_state(rounded)
    return nnx.from_flat_state(
        [(path, v.replace(one(path, v, other[...]))) for (path, v), (_, other) in zip(*flat, strict=True)]
    )


def _taken(path: tuple, variable: nnx.Variable, config: TransformerConfig, layer, expert):
    """Which numbers of a parameter are rounded: True or False along its layers and experts."""
    if path[0] != "stacks":
        return layer == HEAD_LAYER
    _, run, _, place, *_ = path
    numbers = [i for i, where in enumerate(places(config.layers)) if where[:2] == (run, place)]
    taken = jnp.array(numbers) == layer
    if "expert" not in variable.get_metadata("out_sharding"):
        taken &= expert == ALL
        return taken.reshape(-1, *[1] * (variable.ndim - 1))
    of_experts = (_first_expert(path, config) + jnp.arange(variable.shape[1]) == expert) | (expert == ALL)
    return (taken[:, None] & of_experts).reshape(*variable.shape[:2], *[1] * (variable.ndim - 2))


def _first_expert(path: tuple, config: TransformerConfig) -> int:
    """The number of a stack's first expert: experts of several widths are counted on from stack to stack."""
    match path:
        case (*_, "experts", "stacks", int(stack), _):
            return sum(count for count, _ in config.moe.width_classes[:stack])
        case _:
            return 0
