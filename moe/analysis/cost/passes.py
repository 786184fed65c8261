"""The work of a train step, of reading a prompt and of decoding one token, by part of the model.

FLOPs are those of `by_component`. Bytes: every product reads its weights and rows once and writes its rows
once, everything between products is fused into them, attention writes no scores (FlashAttention, 2205.14135),
and weights that are read twice in a pass come from memory once.
"""

from collections import defaultdict
from dataclasses import dataclass

from moe.analysis.compute import by_component
from moe.analysis.cost.matrices import (
    ROW_BYTES,
    Matrices,
    Tokens,
    entering,
    matrices,
    row_bytes,
    weight_bytes,
)
from moe.nn import TransformerConfig

KV_BYTES = 2  # of a number in the cache: bfloat16
GRADIENT_BYTES = 4  # float32


@dataclass(frozen=True)
class Work:
    """What a part of a pass does."""

    flops: float = 0.0
    """Floating-point operations, a multiply-add counted as two."""

    bytes: float = 0.0
    """Read from memory and written to it."""

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


Parts = dict[str, Work]


def total(parts: Parts) -> Work:
    """All parts together."""
    return sum(parts.values(), Work())


def prefill(config: TransformerConfig, batch: int, length: int, weights: str = "bf16", load=None) -> Parts:
    """Reading prompts of `length` tokens: keys and values of all of them, logits of the last one.

    Args:
        config: the model.
        batch: prompts.
        length: tokens of each.
        weights: their format, see `Matrices.stored`.
        load: see `Tokens`.
    """
    tokens = Tokens(batch * length, length, load)
    found = _forward(config, tokens, weights)
    name, head = _head(config)
    per_token = by_component(config, length)[name].forward_flops
    skipped = (tokens.count - batch) * head.outputs * head.inputs
    assert per_token * (tokens.count - batch) == 2 * skipped
    rows = (tokens.count - batch) * (head.inputs + head.outputs) * ROW_BYTES
    found[name] += Work(-2.0 * skipped, -float(rows))
    found["attention"] += Work(0.0, _attended_bytes(config, batch, length))
    return found


def decode(config: TransformerConfig, batch: int, context: int, weights: str = "bf16", load=None) -> Parts:
    """One more token for each of `batch` sequences, which attends to `context` tokens, itself included.

    Experts are read as far as the batch touches them, the cache whole. See `prefill` for the arguments.
    """
    tokens = Tokens(batch, context, load)
    found = _forward(config, tokens, weights)
    # A sequence's tokens see half of it on average, its last one sees all: twice as much.
    attention = config.attention
    charged = attention.heads * (attention.head_width + attention.value_width)
    more = 2 * attention.heads * attention.decoded_width - charged
    flops = batch * more * context * len(config.layers)
    found["attention"] += Work(flops, batch * kv_bytes(config, context))
    return found


def train_step(
    config: TransformerConfig,
    batch: int,
    length: int,
    *,
    accumulation: int = 1,
    state_bytes: float = 0.0,
) -> Parts:
    """Forward, backward and update of one batch.

    `recomputed` is what remat does again: whole layers, or attention's scores (dots). Each product's backward
    pass is two: the input's gradient reads weights and rows, the weights' gradient reads rows and is written
    in float32. The update reads and writes all state once.

    Args:
        config: the model.
        batch: sequences.
        length: tokens of each.
        accumulation: micro-batches, each of which reads all weights and adds to all gradients.
        state_bytes: of parameters, optimizer and average (`memory.TrainingMemory.state`).
    """
    micro = Tokens(batch * length // accumulation, length, training=True)
    count, layers = batch * length, by_component(config, length)
    found: defaultdict[str, Work] = defaultdict(Work)
    for name, part in layers.items():
        found[name] += Work(part.training_flops * count)
    params = 0
    for m in matrices(config):
        size = m.count * m.inputs * m.outputs
        params += size
        read = 2 * weight_bytes(config, m, micro, "bf16") + size * GRADIENT_BYTES
        found[m.part] += Work(0.0, accumulation * (read + 3 * row_bytes(config, m, micro)))
    # Forward q, k, v in and y out; backward those and their gradients.
    found["attention"] += Work(0.0, 3 * _attended_bytes(config, batch, length))
    cast = params * (4 + 2) * accumulation
    found["optimizer"] = Work(0.0, 2 * state_bytes + params * GRADIENT_BYTES + cast)
    if config.remat != "none":
        found["recomputed"] = _recomputed(config, Tokens(count, length, training=True))
    return dict(found)


def kv_bytes(config: TransformerConfig, context: int) -> float:
    """Bytes of one sequence's keys and values, or of the latents they are made of, in all layers."""
    return config.attention.cached_width * context * len(config.layers) * KV_BYTES


def _forward(config: TransformerConfig, tokens: Tokens, weights: str) -> Parts:
    """All logits of a forward pass, without the keys and values that attention reads."""
    found: defaultdict[str, Work] = defaultdict(Work)
    for name, part in by_component(config, tokens.length).items():
        found[name] += Work(part.forward_flops * tokens.count)
    for m in matrices(config):
        moved = weight_bytes(config, m, tokens, weights) + row_bytes(config, m, tokens)
        found[m.part] += Work(0.0, moved)
    return dict(found)


def _recomputed(config: TransformerConfig, tokens: Tokens) -> Work:
    again = _forward(config, tokens, "bf16")
    if config.remat == "full":
        return total({name: work for name, work in again.items() if name not in ("embedding", "head")})
    attention = config.attention
    taken = sum(entering(config, layer, tokens.length) ** 2 for layer in range(len(config.layers)))
    widths = attention.head_width + attention.value_width
    scores = attention.heads * widths * tokens.length * taken
    return Work(scores * tokens.count, _attended_bytes(config, 1, tokens.count))


def _attended_bytes(config: TransformerConfig, batch: int, length: int) -> float:
    """Queries, keys, values and results of attention in all layers, each once."""
    attention = config.attention
    widths = attention.head_width + attention.value_width
    numbers = (attention.heads + attention.kv_heads) * widths
    taken = sum(entering(config, layer, length) for layer in range(len(config.layers)))
    return batch * length * numbers * taken * ROW_BYTES


def _head(config: TransformerConfig) -> tuple[str, Matrices]:
    """The output head's part and matrix."""
    name = "embedding" if config.tied_embedding else "head"
    return name, next(m for m in matrices(config) if m.part == name)
