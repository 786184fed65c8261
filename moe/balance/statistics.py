"""What one layer's routing looked like: counted once, read by losses, controllers, logs and evaluation."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe.kernels import from_groups, to_groups
from moe.mesh import spec
from moe.routing.assignment import Routing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over the tokens of each sequence, so that every scope of a loss is a sum of these.

    Padding counts nowhere. Layers are stacked in front by the transformer: [L, B, ...].
    """

    load: Float[Array, "B E"]
    """Assignments to each expert, dropped ones included. No gradient."""

    score: Float[Array, "B E"]
    """Each expert's share of the scores. Carries the gradient of balance losses."""

    z: Float[Array, "B"]
    """logsumexp(logits)^2 (ST-MoE 2202.08906, eq. 5). Carries the gradient of the z-loss."""

    entropy: Float[Array, "B"]
    """Entropy of the score shares, nats. No gradient."""

    confidence: Float[Array, "B"]
    """Largest score share. No gradient."""

    dropped: Float[Array, "B"]
    """Assignments that the dispatch dropped. No gradient."""

    tokens: Float[Array, "B"]
    """Tokens that are not padding."""

    observed: dict[str, Float[Array, "groups ..."]] = field(default_factory=dict)
    """What the strategy and the balancers sum up besides, group by group (`Routing.observed`,
    `Balancer.observe`)."""


def measure(
    routing: Routing,
    logits: Float[Array, "groups T E"],
    dropped: Bool[Array, "groups A"],
    mask: Bool[Array, "B S"],
) -> RoutingStatistics:
    """Statistics of one layer.

    Args:
        routing: fields [groups, ...]; groups x T tokens = B x S tokens.
        logits: of the router.
        dropped: assignments that the dispatch dropped.
        mask: False for padding.
    """
    experts = logits.shape[-1]
    batch, sequence = mask.shape
    tokens_per_group = logits.shape[1]
    sequences_per_group = max(1, tokens_per_group // sequence)

    def by_sequence(x):
        """[groups, T, ...] -> [B, S, ...]."""
        return from_groups(x, batch, spec("batch", "sequence"))

    # An assignment belongs to its token's sequence; a group may span several sequences or be a part of one.
    token_mask = to_groups(mask, tokens_per_group)
    valid = jax.vmap(lambda mask, token: mask[token])(token_mask, routing.token)
    bins = routing.token // sequence * experts + routing.expert if sequences_per_group > 1 else routing.expert
    valid &= routing.expert < experts
    if routing.chosen is not None:
        valid &= routing.chosen

    def count(chosen):
        hits = bins[..., None] == jnp.arange(sequences_per_group * experts)
        sums = jnp.sum(hits & chosen[..., None], axis=1, dtype=jnp.float32)
        sums = sums.reshape(len(sums), sequences_per_group, experts)
        return from_groups(sums, batch, spec("batch", "sequence")).sum(1)

    share = jnp.where(mask[..., None], by_sequence(routing.scores), 0.0)
    z = by_sequence(jax.nn.logsumexp(logits, axis=-1)) ** 2
    detached = jax.lax.stop_gradient(share)
    entropy = -jnp.sum(
        jnp.where(detached > 0, detached * jnp.log(jnp.maximum(detached, 1e-30)), 0.0), axis=-1
    )
    if routing.load is None:
        load = count(valid)
    else:
        parts = jax.lax.stop_gradient(by_sequence(routing.load))
        load = jnp.where(mask[..., None], parts, 0.0).sum(1)
    return RoutingStatistics(
        load=load,
        score=share.sum(1),
        z=jnp.where(mask, z, 0.0).sum(1),
        entropy=entropy.sum(1),
        confidence=detached.max(-1).sum(1),
        dropped=count(valid & dropped).sum(-1),
        tokens=mask.sum(1, dtype=jnp.float32),
        observed=routing.observed,
    )


def totals(statistics: RoutingStatistics) -> RoutingStatistics:
    """Summed over the batch [L, B, ...] -> [L, ...], and so over all devices."""
    return jax.tree.map(lambda x: jax.sharding.reshard(x.sum(1), spec()), statistics)


def load_fraction(load: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Each expert's part of a layer's assignments times E: 1 everywhere is balance."""
    return load.shape[-1] * load / jnp.maximum(load.sum(-1, keepdims=True), 1.0)


def max_violation(load: Float[Array, "... E"]) -> Float[Array, "..."]:
    """MaxVio (2408.15664, eq. 4): how far the busiest expert lies above the mean load; 0 is balance."""
    mean = load.mean(-1)
    return load.max(-1) / jnp.maximum(mean, 1e-9) - 1.0
