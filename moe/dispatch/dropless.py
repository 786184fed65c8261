"""Dropless dispatch: every assignment is computed, whatever the loads."""

from dataclasses import dataclass

import jax.numpy as jnp

from moe.dispatch.dispatch import Dispatch
from moe.dispatch.plan import by_expert
from moe.kernels import Plan
from moe.routing.assignment import Routing


@dataclass(frozen=True)
class Dropless(Dispatch):
    """Rows sorted by expert, as many for each as it has assignments (MegaBlocks 2211.15841)."""

    tile: int = 128
    """Rows in which experts' groups are padded: one tile is one matrix product of one expert."""

    @property
    def row_tile(self) -> int:
        """See `Dispatch`."""
        return self.tile

    def plan(
        self, routing: Routing, tokens_per_group: int, first_expert, local_experts: int, num_experts: int
    ) -> Plan:
        """See `Dispatch`. Every group of tokens shares the rows of an expert."""
        groups, _ = routing.expert.shape
        token = routing.token + tokens_per_group * jnp.arange(groups)[:, None]
        expert = routing.expert.reshape(-1) - first_expert
        return by_expert(expert, token.reshape(-1), local_experts, self.tile, routing.per_token)
