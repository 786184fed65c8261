"""Dispatch for decoding: few tokens, no gradients, and no expert is read that nobody goes to."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from moe.dispatch.dispatch import TILE, Dispatch
from moe.dispatch.dropless import Dropless
from moe.dispatch.exchange import Exchange
from moe.dispatch.gather import Gather
from moe.kernels.touched_mlp import on_cpu, on_tpu, tile_for
from moe.routing.assignment import Routing


@dataclass(frozen=True)
class Touched(Dispatch):
    """Every assignment is computed, as under `Dropless`; there is no gradient."""

    exchange: Exchange = field(default=Gather(), kw_only=True)
    """Packing few tokens costs more than sending all of them."""

    def compute(self, x, routing: Routing, weights, experts, first_expert, num_experts, *, keep_outputs):
        """See `Dispatch`."""
        local_experts, (groups, tokens, width) = len(next(iter(weights.values()))), x.shape
        if not on_cpu():  # where a group of rows costs nothing if it is empty
            # Of GPUs' kernels; that of TPUs takes groups of any length, and as many rows at a time as divide
            # the buffer: but for a multiple of 8 it would multiply with every expert.
            tile = tile_for(routing.expert.size, num_experts) if on_tpu() else TILE
            return Dropless(tile=tile).compute(
                x, routing, weights, experts, first_expert, num_experts, keep_outputs=keep_outputs
            )
        dropless = Dropless(tile=tile_for(routing.expert.size, num_experts))
        plan = dropless.plan(routing, tokens, first_expert, local_experts, num_experts)
        expert = routing.expert.reshape(-1) - first_expert
        outputs = experts.of_assignments(weights, x.reshape(-1, width), expert, plan)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        weighted = outputs.astype(wide) * routing.combine_weight.reshape(-1, 1).astype(wide)
        if routing.per_token is None:
            y = jax.ops.segment_sum(weighted, plan.token, num_segments=groups * tokens)
        else:
            y = weighted.reshape(groups * tokens, routing.per_token, width).sum(1)
        dropped = jnp.zeros_like(routing.expert, dtype="int8")
        outputs = outputs.reshape(groups, -1, width) if keep_outputs else None
        return y.astype(x.dtype).reshape(x.shape), dropped, outputs
