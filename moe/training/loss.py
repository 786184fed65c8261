"""The training loss: cross-entropy of the next token, plus what the balancers add."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe.balance import BalanceLoss, RoutingStatistics, totals
from moe.kernels import linear_cross_entropy
from moe.mesh import spec
from moe.nn import Transformer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossParts:
    """What one forward pass tells besides the loss itself."""

    nll: Float[Array, "B"]
    """Negative log-likelihood of each row's targets, summed, nats."""

    targets: Float[Array, "B"]
    """Targets in each row, padding left out."""

    balance: Float[Array, ""]
    """What the balancers added to the loss."""

    statistics: RoutingStatistics | None
    """Routing of the MoE layers [L, B, ...]; None for a dense model."""


def training_loss(
    model: Transformer,
    tokens: Int[Array, "B S+1"],
    batch: RoutingStatistics | None = None,
    keys: Key[Array, "B"] | None = None,
    *,
    chunks: int = 1,
) -> tuple[Float[Array, ""], LossParts]:
    """Mean cross-entropy over all targets plus the balance losses, for one micro-batch.

    Args:
        model: the transformer.
        tokens: inputs and, shifted by one, targets.
        batch: statistics of the whole batch where the micro-batch is only a part of it (`BalanceLoss`);
            None takes this micro-batch for the whole.
        keys: randomness of this step, one key a row.
        chunks: see `linear_cross_entropy`.
    """
    hidden, statistics = model(tokens[:, :-1], keys=keys)
    mean, nll = _cross_entropy(model, hidden, tokens, chunks)
    balance = balance_loss(model, statistics, batch)
    by_row = nll.sum(1)
    return mean + balance, LossParts(by_row, jnp.full_like(by_row, nll.shape[1]), balance, statistics)


def evaluation_parts(
    model: Transformer, tokens: Int[Array, "B S+1"], weight: Float[Array, "B S"], *, chunks: int = 1
) -> LossParts:
    """The same without gradient, with weight 0 for padding: sums over a slice give its loss."""
    mask: Bool[Array, "B S"] = weight > 0
    hidden, statistics = model(tokens[:, :-1], mask)
    _, nll = _cross_entropy(model, hidden, tokens, chunks)
    return LossParts((nll * weight).sum(1), weight.sum(1), jnp.zeros(()), statistics)


def _cross_entropy(model: Transformer, hidden, tokens, chunks: int):
    """Devices that have the same hidden states take a part of them each."""
    hidden, targets = jax.sharding.reshard((hidden, tokens[:, 1:]), spec("batch", "loss_sequence"))
    return linear_cross_entropy(hidden, model.output_head(), targets, chunks)


def balance_loss(
    model: Transformer, statistics: RoutingStatistics | None, batch: RoutingStatistics | None
) -> Float[Array, ""]:
    """Sum of the configured balance losses over layers."""
    if statistics is None:
        return jnp.zeros(())
    if batch is None:
        batch = jax.lax.stop_gradient(totals(statistics))
    losses = [b for b in model.config.moe.balance if isinstance(b, BalanceLoss)]
    return sum((loss(statistics, batch) for loss in losses), start=jnp.zeros(()))
