"""One-hot dispatch: GShard's own formulation, by einsum over a tensor of tokens, experts and places."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Int

from moe.dispatch.dispatch import Dispatch
from moe.errors import UserError
from moe.kernels import Groups
from moe.routing.assignment import Routing


@dataclass(frozen=True)
class OneHot(Dispatch):
    """What `Capacity` with priority "position" does, as GShard writes it (2006.16668, algorithm 1).

    A group's dispatch tensor [T, E, C] is 1 where a token has place c of expert e, its combine tensor holds
    the weight there; tokens go to their places and back by einsum. Both cost T * E * C numbers and D times
    as many multiplications, which grows with the square of T: it is here to read and to compare with.
    An exchange other than `Gather` takes the choice of places from it, and moves tokens in its own way.
    """

    capacity_factor: float = 1.25
    """Room relative to perfect balance: C = ceil(capacity_factor * A / E) for a group's A assignments."""

    def __post_init__(self):
        super().__post_init__()
        if not self.capacity_factor > 0:
            raise UserError(f"capacity_factor={self.capacity_factor} must be positive")

    def compute(self, x, routing: Routing, weights, experts, first_expert, num_experts, *, keep_outputs):
        """See `Dispatch`."""
        groups, tokens, width = x.shape
        local_experts = next(iter(weights.values())).shape[0]
        capacity, chosen, position = self._places(routing, num_experts)
        chosen, position = (
            jax.lax.dynamic_slice_in_dim(a, first_expert, local_experts, axis=2) for a in (chosen, position)
        )
        # A position beyond the capacity is a row of zeros: dropped.
        place = chosen[..., None] * jax.nn.one_hot(position, capacity, dtype=x.dtype)
        owner = jax.nn.one_hot(routing.token, tokens, dtype=x.dtype)
        dispatch = jnp.einsum("gat,gaec->gtec", owner, place)
        weight = routing.combine_weight.astype(x.dtype)
        combine = jnp.einsum("gat,ga,gaec->gtec", owner, weight, place)

        rows = jnp.einsum("gtec,gtd->egcd", dispatch, x)
        each = groups * capacity
        sizes = jnp.full_like(routing.expert, each, shape=(local_experts,))
        layout = Groups(sizes, tile=each, uniform=True)
        out = experts.of_rows(weights, rows.reshape(-1, width), layout).reshape(rows.shape)
        y = jnp.einsum("gtec,egcd->gtd", combine, out)
        outputs = jnp.einsum("gaec,egcd->gad", place, out) if keep_outputs else None
        return y, jnp.sum(chosen * (position >= capacity), axis=2).astype("int8"), outputs

    def dropped(self, routing: Routing, num_experts: int) -> Bool[Array, "groups A"]:
        """See `Dispatch`."""
        capacity, chosen, position = self._places(routing, num_experts)
        return jnp.any((chosen > 0) & (position >= capacity), axis=2)

    def _places(self, routing: Routing, num_experts: int):
        """The capacity, and of each assignment [groups, A, E] its expert and its position in the queue."""
        assignments = routing.expert.shape[1]
        capacity = min(math.ceil(self.capacity_factor * assignments / num_experts), assignments)
        chosen = jax.nn.one_hot(routing.expert, num_experts, dtype=jnp.int32)
        return capacity, chosen, self._position(chosen, routing.per_token)

    def _position(self, chosen: Int[Array, "groups A E"], per_token: int | None):
        """How many before it in its group's queue go to the same expert; first choices come first."""
        if per_token is None:
            return jnp.cumsum(chosen, axis=1) - chosen
        queue = rearrange(chosen, "g (t k) e -> g (k t) e", k=per_token)
        return rearrange(jnp.cumsum(queue, axis=1) - queue, "g (k t) e -> g (t k) e", k=per_token)
