"""What a training step takes of each device: memory by kind, and traffic by collective and mesh axis.

All of it follows from the config and the mesh that is set, before anything is compiled or allocated.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe.analysis.hardware import data_sheet
from moe.dispatch import AllToAll, Auto, Exchange
from moe.dispatch.rounds import Buffers
from moe.kernels import rows_needed
from moe.kernels.attention import fits_cudnn
from moe.kernels.device import present_device
from moe.mesh import AXES, axes, axis_size
from moe.nn import TransformerConfig, structure
from moe.routing import Blending

STORAGE = ("embed", "expert_embed", "vocab")  # logical axes that are whole where a parameter is used
WIRE = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0, "all-reduce": 2.0}


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one training step."""

    what: str
    """What travels."""

    collective: str
    """all-gather, reduce-scatter, all-reduce or all-to-all."""

    axes: tuple[str, ...]
    """The mesh axes along which it does."""

    payload: float
    """Bytes of the whole array on a device: what is gathered, summed or exchanged, in all calls of a step."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by ring algorithms."""
        devices = math.prod(axis_size(name) for name in self.axes)
        return WIRE[self.collective] * self.payload * (devices - 1) / devices


@dataclass(frozen=True)
class Step:
    """What a training step has to do, as far as its layout matters."""

    model: TransformerConfig
    """The model."""

    sequences: int
    """Of a micro-batch, over all devices."""

    length: int
    """Tokens of a sequence."""

    accumulation: int = 1
    """Micro-batches."""

    loss_chunks: int = 1
    """Parts in which logits are made."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.sequences * self.length // devices_along("group")

    @property
    def number(self) -> int:
        """Bytes of a number in compute precision."""
        return self.model.dtype.itemsize

    @property
    def passes(self) -> int:
        """How often a layer's forward pass is made in a step."""
        return self.accumulation * (1 if self.model.remat == "none" else 2)


def devices_along(logical: str) -> int:
    """Devices that share a logical axis."""
    return math.prod(axis_size(name) for name in axes(logical))


def memory(step: Step, state: dict[str, Any]) -> dict[str, float]:
    """Bytes on one device by kind, while a step runs.

    Parameters and whatever else is in the state are exact; the rest is an estimate. Activations are what
    backward needs: arrays as wide as a token, rows of experts as many as the buffers of the exchange hold,
    and the scores of attention where no kernel fuses it. Under remat "dots" they are more than is said here,
    which counts what "full" keeps.

    Args:
        step: what is done.
        state: parts of the training state, shapes with shardings, by kind; one of them "parameters".
    """
    found = {kind: float(sum(map(_held, jax.tree.leaves(part)))) for kind, part in state.items()}
    found["gradients"] = found["parameters"] * (1 if step.accumulation == 1 else 2)
    layers = _layers(step)
    gathered = sum(use.size * step.number for use in _uses(step.model) if use.layered)
    if step.model.remat == "none":
        found["matrices in compute precision"] = gathered
        found["activations"] = float(sum(layers))
    else:
        found["matrices in compute precision"] = gathered / len(layers)
        found["activations"] = max(layers) + len(layers) * step.tokens * step.model.width * step.number
    loss_tokens = step.sequences * step.length // devices_along("batch") // devices_along("loss_sequence")
    numbers = loss_tokens / step.loss_chunks * step.model.vocab_size
    found["logits and head"] = numbers * (8 + step.number) + step.model.vocab_size * step.model.width * 8
    return found


def traffic(step: Step) -> list[Traffic]:
    """All collectives of a step that move arrays as large as tokens or matrices, the largest first.

    Without those of the optimizer's update: AdamW has none, and how Muon's products go over matrices that are
    stored in parts is left to XLA.
    """
    found: dict[tuple[str, str, tuple[str, ...]], Traffic] = {}
    for each in (*_parameters(step), *_experts(step), *_attention(step), *_tensor(step)):
        if each.axes and each.payload:
            key = (each.what, each.collective, each.axes)
            found[key] = Traffic(*key, each.payload + (found[key].payload if key in found else 0.0))
    return sorted(found.values(), key=lambda each: -each.sent)


def table(step: Step, state: dict[str, Any]) -> str:
    """Both as a few lines of text; traffic below a hundredth of all is left out."""
    kinds, moved = memory(step, state), traffic(step)
    told = ", ".join(f"{kind} {_bytes(size)}" for kind, size in kinds.items())
    sheet, held = data_sheet(present_device().device_kind), sum(kinds.values())
    there = f" of its {_bytes(sheet.memory / sheet.devices)}" if sheet else ""
    lines = [f"a device holds about {_bytes(held)}{there}: {told}"]
    sent = sum(each.sent for each in moved)
    if moved:
        lines += [f"and sends about {_bytes(sent)} a step:"]
    for each in moved:
        if each.sent > sent / 100:
            along = " x ".join(f"{name} {axis_size(name)}" for name in each.axes)
            lines += [f"  {_bytes(each.sent):>8}  {each.what}: {each.collective} along {along}"]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Use:
    """A parameter where it is multiplied with."""

    kind: str
    size: int  # numbers on a device
    stored: tuple[str, ...]  # mesh axes over which it lies in storage, and is gathered
    summed: tuple[str, ...]  # mesh axes over which its gradient is summed
    layered: bool


def _uses(model: TransformerConfig) -> Iterator[_Use]:
    """Every matrix."""
    _, params = structure(model)
    for path, variable in nnx.to_flat_state(params):
        names = [name for name in variable.get_metadata("out_sharding") if name]
        split = {a for name in names if name in STORAGE for a in axes(name)}
        stored = tuple(a for a in AXES if a in split)
        kept = tuple(a for name in names if name not in STORAGE for a in axes(name))
        size = math.prod(variable.shape) // math.prod(axis_size(a) for a in kept)
        summed = axes("batch") + axes("loss_sequence") if path == ("head",) else axes("group")
        kind = path[0] if path[0] != "stacks" else "experts" if "expert" in names else "other matrices"
        yield _Use(str(kind), size, stored, tuple(a for a in summed if a not in kept), path[0] == "stacks")


def _parameters(step: Step) -> Iterator[Traffic]:
    """Matrices to their use, and gradients back: what is stored in parts is summed into parts."""
    for use in _uses(step.model):
        passes = step.passes if use.layered else step.accumulation
        gathered = use.size * (4 if use.kind == "embedding" else step.number) * passes
        yield Traffic(use.kind, "all-gather", use.stored, gathered)
        back = use.size * (step.number if use.layered else 4) * step.accumulation
        parts = tuple(a for a in use.summed if a in use.stored)
        yield Traffic(f"gradients of {use.kind}", "reduce-scatter", parts, back)
        rest = tuple(a for a in use.summed if a not in use.stored)
        whole = math.prod(axis_size(a) for a in parts)
        yield Traffic(f"gradients of {use.kind}", "all-reduce", rest, back / whole)


def _experts(step: Step) -> Iterator[Traffic]:
    """Tokens to their experts and sums back, forward and backward, under even use."""
    moe, along = step.model.moe, axes("expert")
    if not along or not step.model.moe_layers or isinstance(moe.routing, Blending):
        return
    width, k = moe.latent_width or step.model.width, _choices(step)
    both = (step.passes + step.accumulation) * step.model.moe_layers * len(moe.width_classes)
    exchange = exchange_of(step)
    if isinstance(exchange, AllToAll):
        buffers, rounds = _buffers(step, exchange)
        tokens = rounds * buffers.places * buffers.devices
        yield Traffic(
            "tokens and sums", "all-to-all", along, both * tokens * (2 * width * step.number + 8 * k)
        )
        return
    tokens = step.tokens * axis_size("expert")
    yield Traffic("tokens", "all-gather", along, both * tokens * (width * step.number + 4 * k))
    yield Traffic("sums", "reduce-scatter", along, both * tokens * width * step.number)


def _attention(step: Step) -> Iterator[Traffic]:
    """Queries, keys, values and results between parts of the sequence and parts of the heads."""
    attention = step.model.attention
    heads = (2 * attention.heads + 2 * attention.kv_heads) // devices_along("heads")
    numbers = step.tokens * heads * attention.head_width * len(step.model.layers)
    both = step.passes + step.accumulation
    yield Traffic("heads", "all-to-all", axes("sequence"), both * numbers * step.number)


def _tensor(step: Step) -> Iterator[Traffic]:
    """Sums of what devices with parts of the same matrices computed: of outputs, and of inputs' gradients."""
    model, moe = step.model, step.model.moe
    dense = sum(letter == "D" or moe.shared_experts > 0 for letter in model.layers.upper())
    routed = model.moe_layers * (moe.latent_width or model.width) * len(moe.width_classes)
    forward = (len(model.layers) + dense) * model.width + routed
    backward = (3 * len(model.layers) + 2 * dense) * model.width + routed  # by q, k, v and gate, up
    numbers = step.tokens * (step.passes * forward + step.accumulation * backward)
    yield Traffic("partial sums", "all-reduce", axes("mlp"), numbers * step.number)
    # In the loss they have a part of the tokens each, and of the gradient of final hidden states.
    hidden = step.tokens * model.width * step.number
    yield Traffic("gradient of hidden states", "all-gather", axes("mlp"), step.accumulation * hidden)


def exchange_of(step: Step) -> Exchange:
    """The exchange that the step's dispatch takes."""
    moe = step.model.moe
    exchange = moe.dispatch.exchange
    if not isinstance(exchange, Auto):
        return exchange
    k = _choices(step)
    return exchange.choose(axis_size("expert"), k, present_device(), keep_outputs=moe.needs_outputs)


def _choices(step: Step) -> int:
    """Experts of a token, free ones included."""
    return math.ceil(step.model.moe.routing.experts_per_token(step.model.moe.num_choices))


def _buffers(step: Step, exchange: AllToAll) -> tuple[Buffers, int]:
    rounds, k = step.model.moe.dispatch.chunks, _choices(step)
    return Buffers.sized(step.tokens, k, k, axis_size("expert"), rounds, exchange.room), rounds


def _layers(step: Step) -> list[float]:
    """Bytes that backward needs of each layer's forward pass."""
    model, moe, attention = step.model, step.model.moe, step.model.attention
    heads = 2 * (attention.heads + attention.kv_heads) * attention.head_width
    block = 4 * model.width + heads / devices_along("heads")
    q = jax.ShapeDtypeStruct((1, step.length, 1, attention.head_width), model.dtype)
    if not fits_cudnn(q):
        block += 2 * attention.heads / devices_along("heads") * step.length * 4 / step.number

    def feed_forward(letter: str) -> float:
        if letter == "D":
            return step.tokens * 3 * model.dense_width / devices_along("mlp")
        shared = step.tokens * 3 * moe.shared_hidden / devices_along("mlp")
        logits = step.tokens * 3 * moe.num_choices * 4 / step.number
        return shared + logits + sum(_routed(step, count, width) for count, width in moe.width_classes)

    return [step.number * (step.tokens * block + feed_forward(letter)) for letter in model.layers.upper()]


def _routed(step: Step, count: int, hidden: int) -> float:
    """Numbers that the routed experts of one width keep: tokens that arrived, and what their rows become."""
    moe, devices = step.model.moe, axis_size("expert")
    width, k, held = moe.latent_width or step.model.width, _choices(step), count // devices
    tile, exchange = moe.dispatch.row_tile, exchange_of(step)
    if devices > 1 and isinstance(exchange, AllToAll):
        buffers, rounds = _buffers(step, exchange)
        rows = rounds * rows_needed(devices * buffers.assignments, held, tile)
        arrived = rounds * devices * buffers.places
    else:
        arrived = devices * step.tokens
        rows = rows_needed(arrived * k, held, tile)
    return rows * (2 * width + 3 * hidden / devices_along("mlp")) + arrived * width


def _held(leaf) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize


def _bytes(size: float) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:.3g} {name}"
