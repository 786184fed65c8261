"""Every expert sees some of all tokens: how rarely used experts are calibrated."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.dispatch import Dispatch, Dispatched, Dropless
from moe.mesh import spec
from moe.routing import Routing
from moe.routing.integer_hash import integer_hash


@dataclass(frozen=True)
class Visits(Dispatch):
    """Another dispatch, with every token sent to one more expert besides, drawn at random, at weight zero.

    The layer's output stays what it was, but its experts see tokens that the router sent elsewhere: each as
    many, whatever its load.
    """

    of: Dispatch = field(default_factory=Dropless)
    """The model's own."""

    def __call__(
        self, x: Float[Array, "groups T D"], routing: Routing, weights, experts, **options
    ) -> Dispatched:
        """See `Dispatch`."""
        groups, tokens, _ = x.shape
        choices = options["num_experts"]
        token = jnp.broadcast_to(jnp.arange(tokens), (groups, tokens))
        visited = integer_hash(0, jnp.arange(groups)[:, None], token) % choices
        more = Routing(token, visited.astype(jnp.int32), jnp.zeros((groups, tokens)), scores=None)
        more = jax.sharding.reshard(more, spec("group"))
        per_token = routing.per_token

        def joined(own: Array, visits: Array) -> Array:
            if per_token is None:
                return jnp.concatenate([own, visits], axis=1)
            own = own.reshape(groups, tokens, per_token)
            return jnp.concatenate([own, visits[..., None]], axis=2).reshape(groups, -1)

        both = replace(
            routing,
            token=joined(routing.token, more.token),
            expert=joined(routing.expert, more.expert),
            combine_weight=joined(routing.combine_weight, more.combine_weight),
            per_token=None if per_token is None else per_token + 1,
        )
        y, dropped, outputs = self.of(x, both, weights, experts, **options)

        def own(of_all: Array) -> Array:
            if per_token is None:
                return of_all[:, :-tokens]
            rest = of_all.shape[2:]
            return of_all.reshape(groups, tokens, -1, *rest)[:, :, :-1].reshape(groups, -1, *rest)

        return Dispatched(y, own(dropped), None if outputs is None else own(outputs))
