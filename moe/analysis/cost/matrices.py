"""The matrices of a model, and what a pass of some tokens through them reads and writes."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Float
from numpy import ndarray

from moe.analysis.compute import component
from moe.analysis.cost.touched import touched_by_load, touched_evenly
from moe.nn import TransformerConfig, build
from moe.nn.pattern import places
from moe.nn.quantized import format_of_axes
from moe.nn.router import Frozen
from moe.quant import format_named

ROW_BYTES = 2  # of a number in an activation: bfloat16
PLAIN = {"bf16": 2, "f32": 4}  # bytes of a number in a matrix that is not quantised


@dataclass(frozen=True)
class Matrices:
    """One parameter of the model: equal matrices of some layers, and of some experts in each."""

    part: str
    """The component, as `by_component` has it."""

    inputs: int
    outputs: int

    axes: tuple[str | None, ...] = ()
    """Logical axes of the parameter."""

    layers: tuple[int, ...] = ()
    """Which layers of the model have it, bottom first; none for what stands outside them."""

    experts: range = range(0)
    """Of each layer, in the order of the routing; none where all tokens go through the one matrix."""

    float32: bool = False
    """Kept and used in float32: routers, norms and biases."""

    vector: bool = False
    """Scales and biases, which enter no product."""

    looked_up: bool = False
    """The embedding, of which a token reads one row."""

    @property
    def count(self) -> int:
        """Of the matrices."""
        return max(len(self.layers), 1) * max(len(self.experts), 1)

    def stored(self, weights: str) -> float:
        """Bytes of one matrix, as `moe.nn.quantized` stores it.

        Args:
            weights: bf16 or f32 for all that products read; else the format of what is quantised, by a name
                that `format_named` knows, the rest being bf16.

        Raises:
            UserError: the format does not fit the matrix.
        """
        size = self.inputs * self.outputs
        if self.float32:
            return 4 * size
        if weights in PLAIN:
            return PLAIN[weights] * size
        format = format_of_axes(self.axes, format_named(weights))
        if format is None:
            return PLAIN["bf16"] * size
        scales = self.outputs * format.groups(self.inputs)
        return size * format.bits / 8 + scales * format.scale_dtype.itemsize


def matrices(config: TransformerConfig) -> list[Matrices]:
    """All parameters of a model, frozen ones too."""
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    _, params, frozen, _ = nnx.split(model, nnx.Param, Frozen, ...)
    firsts = [0]
    for number, _ in config.moe.width_classes:
        firsts.append(firsts[-1] + number)

    def found() -> Iterator[Matrices]:
        for path, variable in [*nnx.to_flat_state(params), *nnx.to_flat_state(frozen)]:
            axes = variable.get_metadata("out_sharding")
            *_, inputs, outputs = (1, *variable.shape)
            vector = "norm" in axes
            layers, experts = (), range(0)
            match path:
                case ("stacks", int(stack), "blocks", int(block), *inside):
                    at = enumerate(places(config.layers))
                    layers = tuple(layer for layer, place in at if place[:2] == (stack, block))
                    if "expert" in axes:
                        group = next((step for step in inside if isinstance(step, int)), 0)
                        one = isinstance(config.moe.expert_width, int)
                        experts = range(firsts[group], firsts[-1] if one else firsts[group + 1])
            yield Matrices(
                component(path),
                1 if vector else inputs,
                outputs,
                axes,
                layers,
                experts,
                float32=vector or "router" in axes,
                vector=vector,
                looked_up=path == ("embedding",) and not config.tied_embedding,
            )

    return list(found())


@dataclass(frozen=True)
class Tokens:
    """What goes through a model at once."""

    count: int
    """Tokens."""

    length: int
    """Of the sequences they belong to: Mixture-of-Depths takes a part of each."""

    load: Float[ndarray, "L E"] | None = None
    """Measured load of the experts in each MoE layer, 1 being balance; None: even."""

    training: bool = False
    """Whether strategies choose as in training."""


def weight_bytes(config: TransformerConfig, m: Matrices, tokens: Tokens, weights: str) -> float:
    """Bytes of a parameter that a pass reads: experts that no token visits stay where they are."""
    if m.looked_up:
        return min(tokens.count, m.inputs) * m.outputs * PLAIN["f32" if weights == "f32" else "bf16"]
    if not m.experts:
        return m.count * m.stored(weights)
    return sum(touched(config, m, tokens)) * m.stored(weights)


def touched(config: TransformerConfig, m: Matrices, tokens: Tokens) -> list[float]:
    """Expected number of a parameter's experts that a pass visits, for each of its layers."""
    number = config.moe.num_experts
    mean = config.moe.experts_per_token(tokens.length, training=tokens.training)
    found = []
    for layer in m.layers:
        count = round(tokens.count * entering(config, layer, tokens.length))
        if tokens.load is None:
            found.append(len(m.experts) * touched_evenly(number, mean, count) / number)
        else:
            moe_layer = config.layers[:layer].upper().count("M")
            load = tokens.load[moe_layer, m.experts.start : m.experts.stop]
            found.append(touched_by_load(load * mean / number, count))
    return found


def rows(config: TransformerConfig, m: Matrices, tokens: Tokens) -> float:
    """Rows that a parameter's products take, over all its layers and experts."""
    if m.vector or m.looked_up:
        return 0.0
    visits = 1.0
    if m.experts:
        mean = config.moe.experts_per_token(tokens.length, training=tokens.training)
        visits = mean * len(m.experts) / config.moe.num_experts
    entered = sum(entering(config, layer, tokens.length) for layer in m.layers) if m.layers else 1.0
    return tokens.count * entered * visits


def row_bytes(config: TransformerConfig, m: Matrices, tokens: Tokens) -> float:
    """Bytes of the rows that a parameter's products read and write, each once."""
    if m.looked_up:
        return tokens.count * m.outputs * ROW_BYTES
    return rows(config, m, tokens) * (m.inputs + m.outputs) * ROW_BYTES


def entering(config: TransformerConfig, layer: int, length: int) -> float:
    """Fraction of a sequence's tokens that a layer takes: less than one under Mixture-of-Depths."""
    return config.depth_tokens(length) / length if config.layers[layer].islower() else 1.0
