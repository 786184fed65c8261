"""Capacity dispatch: every expert takes a fixed number of tokens from each group, the rest is dropped."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Int

from moe.dispatch.dispatch import Dispatch
from moe.dispatch.plan import queues
from moe.errors import UserError
from moe.kernels import Groups, Plan
from moe.routing.assignment import Routing


@dataclass(frozen=True)
class Capacity(Dispatch):
    """Each expert has C rows a group, C = ceil(capacity_factor * A / E) (GShard 2006.16668, algorithm 1).

    A is the group's number of assignments, so a factor of 1 is just enough under perfect balance. The
    capacity follows from `tokens_per_group`, which is explicit, and never from the number of devices.
    """

    capacity_factor: float = 1.25
    """Room relative to perfect balance."""

    priority: Literal["position", "score"] = "position"
    """Who keeps a place: `position`, all first choices in token order, then all second choices (GShard);
    `score`, the largest combine weight (V-MoE's batch prioritised routing, 2106.05974)."""

    def __post_init__(self):
        super().__post_init__()
        if not self.capacity_factor > 0:
            raise UserError(f"capacity_factor={self.capacity_factor} must be positive")

    def plan(
        self, routing: Routing, tokens_per_group: int, first_expert, local_experts: int, num_experts: int
    ) -> Plan:
        """See `Dispatch`."""
        groups, _ = routing.expert.shape
        capacity = self._capacity(routing, num_experts)

        rank = self._ranks(routing, num_experts)
        dropped = rank >= capacity
        expert = routing.expert - first_expert
        here = (expert >= 0) & (expert < local_experts)
        group = jnp.arange(groups)[:, None]
        rows = local_experts * groups * capacity
        row = jnp.where(here & ~dropped, (expert * groups + group) * capacity + rank, rows)

        token = routing.token + tokens_per_group * group
        sizes = jnp.full_like(row, groups * capacity, shape=(local_experts,))
        layout = Groups(sizes, tile=groups * capacity, uniform=True)
        return Plan.build(
            row.reshape(-1), token.reshape(-1), (here & dropped).reshape(-1), layout, rows, routing.per_token
        )

    def dropped(self, routing: Routing, num_experts: int) -> Bool[Array, "groups A"]:
        """See `Dispatch`."""
        return self._ranks(routing, num_experts) >= self._capacity(routing, num_experts)

    def _capacity(self, routing: Routing, num_experts: int) -> int:
        assignments = routing.expert.shape[1]
        return min(math.ceil(self.capacity_factor * assignments / num_experts), assignments)

    def _ranks(self, routing: Routing, num_experts: int) -> Int[Array, "groups A"]:
        """Place of each assignment in its expert's queue."""
        return jax.vmap(lambda r: self._rank(r, num_experts))(routing)

    def _rank(self, routing: Routing, num_experts: int):
        """Place of each assignment in its expert's queue, for one group."""
        expert, per_token = routing.expert, routing.per_token
        match self.priority:
            case "score":
                order = jnp.argsort(-routing.combine_weight, stable=True)
            case "position" if per_token is None:
                return queues(expert, num_experts)[0]
            case "position":
                order = rearrange(jnp.arange(expert.shape[0]), "(t k) -> (k t)", k=per_token)
        rank, _ = queues(expert[order], num_experts)
        return jnp.zeros_like(expert).at[order].set(rank, unique_indices=True)
