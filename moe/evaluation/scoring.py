"""Log-likelihood of the ends of texts: what multiple choice and perplexity are made of."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from moe.mesh import spec
from moe.training.evaluate import to_devices


def make_score_step(graph: nnx.GraphDef, *, chunks: int = 1) -> Callable[..., tuple[Array, Array]]:
    """Build the compiled step: (params, controllers, tokens [B, S+1], mask [B, S], scored [B, S]).

    It returns for each row the log-probability of the targets that are scored, nats, and whether each of them
    is the likeliest token in its place, both whole on every device.

    Args:
        graph: structure of the model.
        chunks: parts of the sequence whose logits are made one after the other.
    """

    def step(params, controllers, tokens, mask, scored):
        model = nnx.merge(graph, params, controllers)
        hidden, _ = model(tokens[:, :-1], mask)
        parts = zip(*(jnp.split(x, chunks, axis=1) for x in (hidden, tokens[:, 1:], scored)), strict=True)
        likelihood, missed = zip(*(_of_logits(model.logits(h), *rest) for h, *rest in parts), strict=True)
        found = sum(likelihood), sum(missed) == 0
        return jax.tree.map(lambda x: jax.sharding.reshard(x, spec()), found)

    return jax.jit(step)


def _of_logits(logits, targets, scored):
    """[B] each: log-probability of the scored targets, and how many of them are not the likeliest token."""
    hit = targets[..., None] == jnp.arange(logits.shape[-1])
    of_target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    likelihood = of_target - jax.nn.logsumexp(logits, axis=-1)
    missed = of_target < logits.max(-1)
    return jnp.sum(jnp.where(scored, likelihood, 0.0), axis=1), jnp.sum(missed & scored, axis=1)


def batched(
    pairs: Sequence[tuple[list[int], list[int]]], *, rows: int, length: int, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts with the tokens that follow them, as `tokens`, `mask` and `scored` of a batch.

    A text that is too long loses its beginning.

    Args:
        pairs: at most `rows` of them, each with a context of at least one token.
        rows: of the batch.
        length: S, inputs of a row.
        padding: token behind the texts.
    """
    tokens = np.full((rows, length + 1), padding, np.int32)
    mask, scored = np.zeros((rows, length), bool), np.zeros((rows, length), bool)
    for row, (context, following) in enumerate(pairs):
        text = (context + following)[-(length + 1) :]
        tokens[row, : len(text)] = text
        mask[row, : len(text) - 1] = True
        scored[row, max(0, len(text) - 1 - len(following)) : len(text) - 1] = True
    return tokens, mask, scored


def score(
    step: Callable[..., tuple[Array, Array]],
    params: nnx.State,
    controllers: nnx.State,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    rows: int,
    length: int,
    padding: int,
) -> list[tuple[float, bool]]:
    """Log-probability of what follows each context, and whether greedy decoding would give it.

    Args:
        step: from `make_score_step`.
        params: of the model.
        controllers: state of balance controllers and strategies.
        pairs: tokens of each context, at least one, and those that follow it.
        rows: sequences at once, over all devices.
        length: inputs of a sequence.
        padding: token behind the texts.
    """
    found: list[tuple[float, bool]] = []
    for first in range(0, len(pairs), rows):
        part = pairs[first : first + rows]
        batch = batched(part, rows=rows, length=length, padding=padding)
        likelihood, greedy = jax.device_get(step(params, controllers, *map(to_devices, batch)))
        found += [(float(nats), bool(hit)) for nats, hit in zip(likelihood, greedy, strict=True)][: len(part)]
    return found
