"""Dropless dispatch: every assignment is computed, whatever the loads."""

from dataclasses import dataclass

import jax.numpy as jnp

from moe.dispatch.dispatch import Dispatch
from moe.dispatch.plan import queues
from moe.kernels import Groups, Plan, rows_needed
from moe.routing.assignment import Routing


@dataclass(frozen=True)
class Dropless(Dispatch):
    """Rows sorted by expert, as many for each as it has assignments (MegaBlocks 2211.15841)."""

    tile: int = 128
    """Rows in which experts' groups are padded: one tile is one matrix product of one expert."""

    def plan(
        self, routing: Routing, tokens_per_group: int, first_expert, local_experts: int, num_experts: int
    ) -> Plan:
        """See `Dispatch`. Every group of tokens shares the rows of an expert."""
        groups, _ = routing.expert.shape
        token = routing.token + tokens_per_group * jnp.arange(groups)[:, None]
        token, expert = token.reshape(-1), routing.expert.reshape(-1) - first_expert
        here = (expert >= 0) & (expert < local_experts)
        expert = jnp.where(here, expert, local_experts)

        rank, sizes = queues(expert, local_experts)
        layout = Groups(sizes, self.tile)
        rows = rows_needed(expert.shape[0], local_experts, self.tile)
        start = layout.starts().at[expert].get(mode="fill", fill_value=0)
        row = jnp.where(here, start + rank, rows)
        return Plan.build(row, token, jnp.zeros_like(here), layout, rows, routing.per_token)
