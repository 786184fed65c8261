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

CACHE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a number in the cache
SCALE_BYTES = 4  # of each vector of a head in an int8 cache
SCORES = "attention scores"  # softmax(q k^T) v; queries, keys, values and the output are `attention`
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


def prefill(
    config: TransformerConfig,
    batch: int,
    length: int,
    weights: str = "bf16",
    load=None,
    cache: str = "bfloat16",
) -> Parts:
    """Reading prompts of `length` tokens: keys and values of all of them, logits of the last one.

    Args:
        config: the model.
        batch: prompts.
        length: tokens of each.
        weights: their format, see `Matrices.stored`.
        load: see `Tokens`.
        cache: type of keys and values, see `kv_bytes`.
    """
    tokens = Tokens(batch * length, length, load)
    found = _forward(config, tokens, weights)
    name, head = _head(config)
    per_token = by_component(config, length)[name].forward_flops
    skipped = (tokens.count - batch) * head.outputs * head.inputs
    assert per_token * (tokens.count - batch) == 2 * skipped
    rows = (tokens.count - batch) * (head.inputs + head.outputs) * ROW_BYTES
    found[name] += Work(-2.0 * skipped, -float(rows))
    written = batch * kv_bytes(config, length, cache)
    found[SCORES] += Work(0.0, _attended_bytes(config, batch, length) + written)
    return dict(found)


def decode(
    config: TransformerConfig,
    batch: int,
    context: int,
    weights: str = "bf16",
    load=None,
    cache: str = "bfloat16",
) -> Parts:
    """One more token for each of `batch` sequences, which attends to a cache of `context` tokens.

    Experts are read as far as the batch touches them, the cache whole, as far as it is allocated. See
    `prefill` for the arguments.
    """
    found = _forward(config, Tokens(batch, context, load), weights)
    attention = config.attention
    # A score with each token of the cache and its part of the sum; values are padded to the width of keys.
    flops = 2 * attention.heads * 2 * attention.head_width * batch * context * len(config.layers)
    found[SCORES] = Work(float(flops), batch * kv_bytes(config, context, cache))
    return dict(found)


def train_step(
    config: TransformerConfig,
    batch: int,
    length: int,
    *,
    accumulation: int = 1,
    state_bytes: float = 0.0,
) -> Parts:
    """Forward, backward and update of one batch.

    `recomputed` is what remat does again: whole layers, or attention's scores (dots). `counting` is the
    forward pass for a balance loss over an accumulated batch (`TransformerConfig.counts_first`). Each
    product's backward pass is two: the input's gradient reads weights and rows, the weights' gradient reads
    rows and is written in float32. The update reads and writes all state once.

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
    _part_scores(found, 3 * count * score_flops(config, length))
    params = 0
    for m in matrices(config):
        size = m.count * m.inputs * m.outputs
        params += size
        read = 2 * weight_bytes(config, m, micro, "bf16") + size * GRADIENT_BYTES
        found[m.part] += Work(0.0, accumulation * (read + 3 * row_bytes(config, m, micro)))
    # Forward q, k, v in and y out; backward those and their gradients.
    found[SCORES] += Work(0.0, 3 * _attended_bytes(config, batch, length))
    cast = params * (4 + 2) * accumulation
    found["optimizer"] = Work(0.0, 2 * state_bytes + params * GRADIENT_BYTES + cast)
    if config.remat != "none":
        found["recomputed"] = _recomputed(config, Tokens(count, length, training=True))
    if config.counts_first(accumulation):
        found["counting"] = _layers(config, Tokens(count, length, training=True))
    return dict(found)


def kv_bytes(config: TransformerConfig, context: int, cache: str = "bfloat16") -> float:
    """Bytes of one sequence's keys and values in all layers, as `moe.decode` holds them.

    Latent attention leaves the keys and values of all heads behind too, values padded to the width of keys.

    Args:
        config: the model.
        context: tokens that the cache holds.
        cache: float32, bfloat16 or int8, which has a float32 scale for each vector.
    """
    attention = config.attention
    vector = attention.head_width * CACHE_BYTES[cache] + (SCALE_BYTES if cache == "int8" else 0)
    return float(2 * attention.kv_heads * vector * context * len(config.layers))


def score_flops(config: TransformerConfig, length: int) -> float:
    """FLOPs of one token's q k^T and of the sum of values, by the half that causality leaves."""
    taken = sum(entering(config, layer, length) ** 2 for layer in range(len(config.layers)))
    attention = config.attention
    return attention.heads * (attention.head_width + attention.value_width) * length * taken


def _forward(config: TransformerConfig, tokens: Tokens, weights: str) -> defaultdict[str, Work]:
    """All logits of a forward pass, without the keys and values that attention reads."""
    found: defaultdict[str, Work] = defaultdict(Work)
    for name, part in by_component(config, tokens.length).items():
        found[name] += Work(part.forward_flops * tokens.count)
    _part_scores(found, tokens.count * score_flops(config, tokens.length))
    for m in matrices(config):
        moved = weight_bytes(config, m, tokens, weights) + row_bytes(config, m, tokens)
        found[m.part] += Work(0.0, moved)
    return found


def _part_scores(found: defaultdict[str, Work], flops: float) -> None:
    """Take attention's scores out of its projections, as a part of their own."""
    found["attention"] += Work(-flops)
    found[SCORES] += Work(flops)


def _recomputed(config: TransformerConfig, tokens: Tokens) -> Work:
    if config.remat == "full":
        return _layers(config, tokens)
    scores = score_flops(config, tokens.length) * tokens.count
    return Work(scores, _attended_bytes(config, 1, tokens.count))


def _layers(config: TransformerConfig, tokens: Tokens) -> Work:
    """A forward pass without embedding and head."""
    forward = _forward(config, tokens, "bf16")
    return total({name: work for name, work in forward.items() if name not in ("embedding", "head")})


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
