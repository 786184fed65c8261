"""Exchange by gathering: every device sees all tokens."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.dispatch.exchange import Exchange, ExpertWeights, Returned, Work
from moe.errors import UserError
from moe.mesh import axis_index, axis_size
from moe.routing.assignment import Routing


@dataclass(frozen=True)
class Gather(Exchange):
    """Tokens are gathered along `expert`, each device computes its own experts for all, sums are scattered.

    Nothing is packed and nothing can overflow. A token travels to every device, whether it has an expert
    there or not, and a device makes room for all assignments of all tokens: memory grows with the axis.
    """

    def __call__(
        self, work: Work, x: Float[Array, "groups T D"], routing: Routing, weights: ExpertWeights
    ) -> Returned:
        """See `Exchange`."""
        split, local_experts = axis_size("expert"), next(iter(weights.values())).shape[0]
        first = work.first_expert + axis_index("expert") * local_experts

        def there_and_back(x, assignments) -> Returned:
            if split > 1:
                x, assignments = jax.lax.all_gather((x, assignments), "expert", axis=0, tiled=True)
            here = Routing(*assignments, scores=None, per_token=routing.per_token)
            back: Any = work.dispatch.compute(
                x, here, weights, work.experts, first, work.num_experts, keep_outputs=work.keep_outputs
            )
            if split > 1:
                back = jax.lax.psum_scatter(back, "expert", scatter_dimension=0, tiled=True)
            return Returned(*back)

        assignments = (routing.token, routing.expert, routing.combine_weight)
        parts = [there_and_back(*chunk) for chunk in _cut((x, assignments), work.dispatch.chunks, len(x))]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)


def _cut(arrays, chunks: int, groups: int) -> list:
    """The chunks of arrays [groups, ...]."""
    if groups % chunks:
        raise UserError(
            f"model.moe.dispatch.chunks={chunks} does not divide the {groups} groups of tokens of a device; "
            "choose a divisor"
        )
    size = groups // chunks
    return [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], arrays) for i in range(chunks)]
