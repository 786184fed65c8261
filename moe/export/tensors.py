"""Which tensor of a Hugging Face checkpoint is which parameter of ours, and in what layout: both ways.

An architecture lists a `Tensor` for everything that it can have. Those whose parameter a model lacks (a bias,
a dense layer, shared experts) do not apply to it, so that no list depends on a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from moe.nn import TransformerConfig, build
from moe.nn.pattern import places

Leaves = dict[str, jax.ShapeDtypeStruct]
"""Parameters of a model by name, such as `stacks/0/blocks/0/attention/w_q`, stacked by layer."""


@dataclass(frozen=True)
class Layout:
    """How an array of ours lies in theirs; both functions take any leading axes and keep every bit."""

    to_theirs: Callable[[np.ndarray], np.ndarray]
    to_ours: Callable[[np.ndarray], np.ndarray]


def _transposed(matrix: np.ndarray) -> np.ndarray:
    return matrix.swapaxes(-1, -2)


AS_IS = Layout(lambda array: array, lambda array: array)
TRANSPOSED = Layout(_transposed, _transposed)
"""[in, out] is [out, in] there."""


class Part(NamedTuple):
    """One of several equal parts of a tensor [E, parts * F, D] that holds all experts of a layer."""

    theirs: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Tensor:
    """One tensor of theirs, or one for each expert where its name has `{expert}`."""

    theirs: str
    """Name, behind `model.layers.N.` for a layer's."""

    ours: str
    """Name of our parameter in the block, or in the model for what belongs to no layer."""

    layout: Layout = AS_IS
    """How ours lies in it."""

    also: str | None = None
    """Another name under which checkpoints hold it."""

    fused: Part | None = None
    """Where checkpoints hold the layer's experts in one tensor."""

    float32: bool = False
    """Whether it stays float32 in an export of lower precision."""


MODEL = (
    Tensor("model.embed_tokens.weight", "embedding"),
    Tensor("model.norm.weight", "final_norm/scale"),
    Tensor("lm_head.weight", "head", TRANSPOSED),
)

NORMS = (
    Tensor("input_layernorm.weight", "attention_norm/scale"),
    Tensor("post_attention_layernorm.weight", "feed_forward_norm/scale"),
)

ATTENTION = (
    Tensor("self_attn.q_proj.weight", "attention/w_q", TRANSPOSED),
    Tensor("self_attn.k_proj.weight", "attention/w_k", TRANSPOSED),
    Tensor("self_attn.v_proj.weight", "attention/w_v", TRANSPOSED),
    Tensor("self_attn.o_proj.weight", "attention/w_out", TRANSPOSED),
    Tensor("self_attn.q_proj.bias", "attention/b_q"),
    Tensor("self_attn.k_proj.bias", "attention/b_k"),
    Tensor("self_attn.v_proj.bias", "attention/b_v"),
    Tensor("self_attn.q_norm.weight", "attention/q_norm/scale"),
    Tensor("self_attn.k_norm.weight", "attention/k_norm/scale"),
)


def feed_forward(theirs: str, ours: str) -> tuple[Tensor, ...]:
    """A SwiGLU feed-forward that all tokens use."""
    return tuple(
        Tensor(f"{theirs}.{name}_proj.weight", f"{ours}/w_{name}", TRANSPOSED)
        for name in ("gate", "up", "down")
    )


DENSE = feed_forward("mlp", "dense")

FUSED_GATE = Part("mlp.experts.gate_up_proj", 0, 2)
FUSED_UP = Part("mlp.experts.gate_up_proj", 1, 2)
FUSED_DOWN = Part("mlp.experts.down_proj")

EXPERTS = (
    Tensor("mlp.gate.weight", "moe/router/w", TRANSPOSED),
    Tensor("mlp.experts.{expert}.gate_proj.weight", "moe/experts/w_gate", TRANSPOSED, fused=FUSED_GATE),
    Tensor("mlp.experts.{expert}.up_proj.weight", "moe/experts/w_up", TRANSPOSED, fused=FUSED_UP),
    Tensor("mlp.experts.{expert}.down_proj.weight", "moe/experts/w_down", TRANSPOSED, fused=FUSED_DOWN),
)

SCORE_BIAS = (Tensor("mlp.gate.e_score_correction_bias", "moe/controller_state/bias", float32=True),)
SIGMOID_MIXTURE = (*DENSE, *EXPERTS, *SCORE_BIAS, *feed_forward("mlp.shared_experts", "moe/shared"))


class Slot(NamedTuple):
    """One parameter of one layer, or of the model, and what it is there."""

    tensor: Tensor
    """Its declaration."""

    leaf: str
    """Name of our parameter."""

    repetition: int | None
    """Place of the layer in it; None where it is not stacked."""

    layer: int | None
    """Number of the layer."""

    shape: tuple[int, ...]
    """Of ours, in this layer."""

    @property
    def prefix(self) -> str:
        """What stands before their name."""
        return "" if self.layer is None else f"model.layers.{self.layer}."

    @property
    def names(self) -> list[str]:
        """Their names: one, or one for each expert."""
        if "{expert}" not in self.tensor.theirs:
            return [self.prefix + self.tensor.theirs]
        return [self.prefix + self.tensor.theirs.format(expert=expert) for expert in range(self.shape[0])]

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of each of their tensors."""
        ours = self.shape if len(self.names) == 1 and "{expert}" not in self.tensor.theirs else self.shape[1:]
        # A broadcast zero takes no memory.
        return self.tensor.layout.to_theirs(np.broadcast_to(np.float32(0), ours)).shape

    def to_theirs(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """Their tensors, in the order of `names`."""
        if "{expert}" in self.tensor.theirs:
            yield from (self.tensor.layout.to_theirs(expert) for expert in array)
        else:
            yield self.tensor.layout.to_theirs(array)


def leaves(model: TransformerConfig) -> Leaves:
    """What a checkpoint must fill: parameters, and the bias of the choice where a controller steers it."""
    built = jax.eval_shape(lambda: build(model, jax.random.key(0)))
    _, params, rest = nnx.split(built, nnx.Param, ...)
    named = {}
    for state in (params, rest):
        for path, variable in nnx.to_flat_state(state):
            if state is params or path[-2:] == ("controller_state", "bias"):
                name = "/".join(map(str, path))
                named[name] = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    return named


def slots(tensors: tuple[Tensor, ...], model: TransformerConfig) -> list[Slot]:
    """Everything that a checkpoint of this model holds: the model's own tensors first, then layer by layer.

    Raises:
        ValueError: a parameter of the model is no tensor of the architecture.
    """
    known = leaves(model)
    found = [
        Slot(tensor, tensor.ours, None, None, known[tensor.ours].shape)
        for tensor in tensors
        if tensor.ours in known
    ]
    for layer, (run, place, repetition) in enumerate(places(model.layers)):
        for tensor in tensors:
            leaf = f"stacks/{run}/blocks/{place}/{tensor.ours}"
            if leaf in known:
                found.append(Slot(tensor, leaf, repetition, layer, known[leaf].shape[1:]))
    unplaced = known.keys() - {slot.leaf for slot in found}
    if unplaced:
        raise ValueError(f"no tensor holds {sorted(unplaced)[0]}")
    return found
