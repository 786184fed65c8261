"""What routing decides, and what it may look at: the two types that every strategy speaks."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which token of a group goes to which expert, with what combine weight: a flat list of A assignments.

    Dispatch and balancing read nothing else, so they do not know which strategy ran. An assignment whose
    `expert` equals the number of experts goes nowhere (strategies with a changing number of experts per
    token pad with it).
    """

    token: Int[Array, "A"]
    """Index of the token inside its group."""

    expert: Int[Array, "A"]
    """Index of the expert, or the number of experts for an assignment that goes nowhere."""

    combine_weight: Float[Array, "A"]
    """Gate value by which the expert's output is multiplied; gradients reach the router through it."""

    scores: Float[Array, "T E"] | None
    """Every expert's share of every token, rows sum to one: the P of balance losses, entropy, confidence.
    None inside a dispatch, where they play no part."""

    per_token: int | None = jax.tree.static(default=None)
    """K where the list is token-major with exactly K assignments a token, else None."""

    chosen: Bool[Array, "A"] | None = None
    """False for assignments that are computed for the router's gradient only and count as no load; None where
    all are chosen."""

    default_weight: Float[Array, "T E"] | None = None
    """Weight of each expert's default output (`default_output` in the strategy's state), added to the layer's
    output; None where absent experts add nothing."""

    load: Float[Array, "T E"] | None = None
    """Each token's part of each expert's load, where it comes in fractions; None counts assignments."""

    observed: dict[str, Array] = field(default_factory=dict)
    """What the strategy tells balancers and its own state besides: sums over the group's tokens, padding left
    out, by name (`Strategy.observes`)."""

    @staticmethod
    def token_major(
        expert: Int[Array, "T K"], combine_weight: Float[Array, "T K"], **fields: Any
    ) -> "Routing":
        """The list of K assignments for each of T tokens, token after token.

        Args:
            expert: each token's experts.
            combine_weight: their gate values.
            fields: the other fields, `scores` among them.
        """
        tokens, per_token = expert.shape
        return Routing(
            token=jnp.repeat(jnp.arange(tokens), per_token),
            expert=expert.reshape(-1),
            combine_weight=combine_weight.reshape(-1),
            per_token=per_token,
            **fields,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What a strategy may look at besides logits, for the T tokens of one group."""

    token_id: Int[Array, "T"]
    """Vocabulary ids (hash routing)."""

    mask: Bool[Array, "T"]
    """False for padding."""

    key: Key[Array, ""] | None = None
    """Randomness of this step, layer and group while training, whatever the layout of the run; None in
    evaluation."""

    x: Float[Array, "T D"] | None = None
    """The tokens themselves, as the router sees them."""

    layer: Int[ArrayLike, ""] = 0
    """Index of this layer among the MoE layers, bottom first."""

    parameters: dict[str, Array] = field(default_factory=dict)
    """What the strategy trains (`Strategy.parameters`)."""

    state: dict[str, Array] = field(default_factory=dict)
    """What the strategy carries from step to step (`Strategy.initial_state`)."""
