"""Compute accounting: parameters that exist, parameters a token uses, floating-point operations it costs."""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe.analysis.hardware import data_sheet_peak
from moe.mesh import MeshConfig, make_mesh
from moe.nn import TransformerConfig, build
from moe.nn.pattern import repeats
from moe.nn.router import Frozen


@dataclass(frozen=True)
class Compute:
    """What a model, or a component of it, holds, and what it spends on one token."""

    total_params: int
    """All trained parameters."""

    active_params: float
    """Parameters that one token uses: routed experts count by the fraction of them that it visits, under even
    use of all that the router chooses from."""

    forward_flops: float
    """Floating-point operations of one token's forward pass, a multiply-add counted as two."""

    training_flops: float
    """The same with the backward pass: three times the forward pass, which for some strategies computes more
    experts while training; recomputation (remat) not counted."""

    def __add__(self, other: "Compute") -> "Compute":
        """Both together."""
        return Compute(
            self.total_params + other.total_params,
            self.active_params + other.active_params,
            self.forward_flops + other.forward_flops,
            self.training_flops + other.training_flops,
        )


NOTHING = Compute(0, 0.0, 0.0, 0.0)

# The component that a parameter counts under, by the name of the attribute that holds it or its module. A
# parameter that is not listed is a component of its own name.
COMPONENTS = {
    "embedding": "embedding",
    "attention": "attention",
    "depth": "depth router",
    "router": "router",
    "strategy": "router",
    "latent": "latent projection",
    "experts": "experts",
    "free": "free experts",
    "shared": "shared experts",
    "dense": "dense",
    "head": "head",
    "attention_norm": "norms",
    "feed_forward_norm": "norms",
    "final_norm": "norms",
}


def account(config: TransformerConfig, sequence_length: int) -> Compute:
    """Parameters and FLOPs of a model on sequences of `sequence_length` tokens: the sum of its components."""
    return sum(by_component(config, sequence_length).values(), NOTHING)


def by_component(config: TransformerConfig, sequence_length: int) -> dict[str, Compute]:
    """Parameters and FLOPs of each component of a model, in the order of `COMPONENTS`.

    Matrix products and attention are counted, the rest (norms, softmax, router choice, dispatch) is not, nor
    are rows that only pad a tile or a capacity. Causal attention is charged half the square, since a token
    sees half the sequence on average (PaLM, 2204.02311 appendix B, charges the whole). The embedding look-up
    costs nothing, the output head does; where the two are tied, `embedding` holds the head's FLOPs. A frozen
    router is no trained parameter, but costs its forward pass and the gradient of its input.

    A token's experts are as many as `MoEConfig.experts_per_token` says, evenly drawn: experts of several
    widths weigh by their numbers, and free experts take their share of the K. A layer that only some tokens
    enter (Mixture-of-Depths) counts by their fraction.
    """
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    _, params, frozen, _ = nnx.split(model, nnx.Param, Frozen, ...)
    found: dict[str, Compute] = {}
    for path, variable in nnx.to_flat_state(params):
        axes, size = variable.get_metadata("out_sharding"), math.prod(variable.shape)
        use = _use(config, path, sequence_length, routed="expert" in axes)
        looked_up = path == ("embedding",) and not config.tied_embedding
        flops = 0 if looked_up or "norm" in axes else 2 * size
        part = Compute(size, size * use.active, flops * use.forward, 3 * flops * use.training)
        found[component(path)] = found.get(component(path), NOTHING) + part
    for path, variable in nnx.to_flat_state(frozen):
        flops = 2 * math.prod(variable.shape) * _use(config, path, sequence_length).forward
        found[component(path)] = found.get(component(path), NOTHING) + Compute(0, 0.0, flops, 2 * flops)

    # q k^T and its product with v: those of a sequence's tokens that enter a layer, with half of them each.
    entering = [_entering(config, kind, sequence_length) for kind in config.layers]
    pairs = sum(tokens * tokens / 2 for tokens in entering) / sequence_length
    attention = config.attention
    scores = 2 * attention.heads * (attention.head_width + attention.value_width) * pairs
    found["attention"] += Compute(0, 0.0, scores, 3 * scores)
    return {name: found[name] for name in [*COMPONENTS.values(), *found] if name in found}


class _Use(NamedTuple):
    """How much of a parameter one token uses on average."""

    active: float
    forward: float
    training: float


def _use(config: TransformerConfig, path: tuple, sequence_length: int, *, routed: bool = False) -> _Use:
    kind = "D"
    match path:
        case ("stacks", int(stack), "blocks", int(block), part, *_) if part != "depth":
            kind = repeats(config.layers)[stack][0][block]
    tokens = _entering(config, kind, sequence_length)
    entered, moe = tokens / sequence_length, config.moe
    if not routed:
        return _Use(entered, entered, entered)
    return _Use(
        entered * moe.routing.experts_per_token(moe.num_choices) / moe.num_choices,
        entered * moe.experts_per_token(tokens) / moe.num_experts,
        entered * moe.experts_per_token(tokens, training=True) / moe.num_experts,
    )


def _entering(config: TransformerConfig, kind: str, sequence_length: int) -> int:
    """Tokens of a sequence that a layer of this kind computes: some of them under Mixture-of-Depths."""
    return config.depth_tokens(sequence_length) if kind.islower() else sequence_length


def component(path: tuple) -> str:
    """The component that a parameter counts under, by its path in the model."""
    return next((COMPONENTS[str(part)] for part in path if part in COMPONENTS), str(path[-1]))


def device_peak(dtype: jnp.dtype) -> float:
    """Peak FLOP/s of one device: dense bf16 by its data sheet, else (CPUs) measured in `dtype`."""
    return data_sheet_peak(jax.devices()[0].device_kind) or measured_peak(dtype)


def measured_peak(dtype: jnp.dtype) -> float:
    """The best of a few 2048-cubed matrix products: what XLA reaches on this device, not what it could do."""
    size, device = 2048, jax.local_devices()[0]
    multiply, seconds = jax.jit(jnp.matmul), []
    with jax.set_mesh(make_mesh(MeshConfig(), [device])):
        operand = jax.device_put(np.full((size, size), 0.5, dtype), device)
        multiply(operand, operand).block_until_ready()
        for _ in range(4):
            started = time.perf_counter()
            multiply(operand, operand).block_until_ready()
            seconds.append(time.perf_counter() - started)
    # Simulated CPU devices are one machine.
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    return 2 * size**3 / min(seconds) / sharing
