"""The interface of dispatch, and the part all dispatches share: gather, experts, combine, across the mesh."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8

from moe.errors import UserError
from moe.kernels import Groups, Plan, assignment_rows, combine_rows, gather_rows
from moe.mesh import axes, axis_index, axis_size, layouts, spec, varying
from moe.routing.assignment import Routing

ExpertWeights = dict[str, Float[Array, "E ..."]]


@dataclass(frozen=True)
class ExpertFunction:
    """What the experts compute, whatever brings them their tokens."""

    of_rows: Callable[[ExpertWeights, Float[Array, "R D"], Groups], Float[Array, "R D"]]
    """From rows grouped by expert to rows of output."""

    of_tokens: Callable[[ExpertWeights, Float[Array, "T D"], Float[Array, "A"], Plan], Float[Array, "T D"]]
    """From tokens, combine weights and a plan to each token's weighted sum, without keeping any rows."""


class Dispatched(NamedTuple):
    """What comes back from the experts."""

    y: Float[Array, "groups T D"]
    """Each token's outputs, summed by combine weight."""

    dropped: Bool[Array, "groups A"]
    """Assignments that found no room."""

    outputs: Float[Array, "groups A D"] | None
    """Each assignment's output before its combine weight, zeros where it has none; None unless asked for."""


@dataclass(frozen=True)
class Dispatch:
    """Brings tokens to their experts and back. A frozen dataclass, and thereby its own config.

    A dispatch differs from another only in its `plan`. Over the `expert` mesh axis tokens are gathered, each
    device computes its own experts for all of them, and the sums are scattered back; a device therefore
    never needs another's experts, and no assignment is lost on the way.
    """

    chunks: int = field(default=1, kw_only=True)
    """Parts into which a device's groups of tokens are cut. Each is gathered, computed and scattered back by
    itself, so that one part can travel along `expert` while another is computed."""

    def __post_init__(self):
        if self.chunks < 1:
            raise UserError(f"model.moe.dispatch.chunks={self.chunks} must be at least 1")

    def plan(
        self, routing: Routing, tokens_per_group: int, first_expert, local_experts: int, num_experts: int
    ) -> Plan:
        """Rows for one device: its groups' assignments (leading axis) to its own experts.

        Args:
            routing: fields [groups, A].
            tokens_per_group: T; token i of group g is token g * T + i of the device.
            first_expert: index of this device's first expert.
            local_experts: how many it has.
            num_experts: E, all that the assignments are spread over.
        """
        raise NotImplementedError

    def __call__(
        self,
        x: Float[Array, "groups T D"],
        routing: Routing,
        weights: ExpertWeights,
        experts: ExpertFunction,
        *,
        first_expert: int = 0,
        num_experts: int | None = None,
        keep_outputs: bool = False,
    ) -> Dispatched:
        """Apply the experts to their tokens and sum each token's results by combine weight.

        Args:
            x: tokens in groups, split over the mesh by group.
            routing: fields [groups, A].
            weights: the experts' matrices [E, ...], split over the `expert` axis.
            experts: what they compute.
            first_expert: number that the first of these experts has in `routing`; assignments to experts
                that `weights` does not hold add nothing.
            num_experts: all that `routing` chooses from; None where `weights` holds every one of them.
            keep_outputs: return each assignment's output too, [A, D] numbers that are otherwise never held.
        """
        # Scores are the balancers' business and take no part here.
        assignments = (routing.token, routing.expert, routing.combine_weight)

        def on_one_device(x, assignments, weights):
            x, assignments, weights = varying((x, assignments, weights), axes("group") + axes("mlp"))
            local_experts = next(iter(weights.values())).shape[0]
            first = first_expert + axis_index("expert") * local_experts
            known = num_experts or local_experts * axis_size("expert")

            def there_and_back(x, assignments):
                split = axis_size("expert")
                if split > 1:
                    x, assignments = jax.lax.all_gather((x, assignments), "expert", axis=0, tiled=True)
                local_routing = Routing(*assignments, scores=None, per_token=routing.per_token)
                back = self.compute(
                    x, local_routing, weights, experts, first, known, keep_outputs=keep_outputs
                )
                if split > 1:
                    back = jax.lax.psum_scatter(back, "expert", scatter_dimension=0, tiled=True)
                return back

            parts = [there_and_back(*chunk) for chunk in self._cut((x, assignments), len(x))]
            y, lost, outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
            # Each device along `tensor` has multiplied with some of the hidden units.
            if parts_of := axes("mlp"):
                y, outputs = jax.lax.psum((y, outputs), parts_of)
                lost = jax.lax.pmax(lost, parts_of)
            return y, lost, outputs

        y, lost, outputs = jax.shard_map(
            on_one_device,
            in_specs=(spec("group"), spec("group"), layouts(weights)),
            out_specs=spec("group"),
        )(x, assignments, weights)
        return Dispatched(y, lost > 0, outputs)

    def compute(
        self,
        x: Float[Array, "groups T D"],
        routing: Routing,
        weights: ExpertWeights,
        experts: ExpertFunction,
        first_expert,
        num_experts: int,
        *,
        keep_outputs: bool,
    ) -> tuple[Float[Array, "groups T D"], Int8[Array, "groups A"], Float[Array, "groups A D"] | None]:
        """What one device's experts give, summed by combine weight; and 1 where it drops an assignment.

        Args:
            x: all tokens that lie before this device.
            routing: their assignments, to any device's experts.
            weights: of this device's experts.
            experts: what they compute.
            first_expert: index of this device's first expert.
            num_experts: E, all that the assignments are spread over.
            keep_outputs: the third result is each assignment's output, zeros where it has none; else None.
        """
        groups, tokens_per_group, width = x.shape
        local_experts = next(iter(weights.values())).shape[0]
        plan = self.plan(routing, tokens_per_group, first_expert, local_experts, num_experts)
        flat, combine_weight = x.reshape(groups * tokens_per_group, width), routing.combine_weight.reshape(-1)
        if keep_outputs:
            rows = experts.of_rows(weights, gather_rows(flat, plan), plan.groups)
            y = combine_rows(rows, combine_weight, plan, flat[:, 0])
            outputs = assignment_rows(rows, plan).reshape(groups, -1, width)
        else:
            y, outputs = experts.of_tokens(weights, flat, combine_weight, plan), None
        return y.reshape(x.shape), plan.dropped.reshape(groups, -1).astype("int8"), outputs

    def _cut(self, arrays, groups: int) -> list:
        """The chunks of arrays [groups, ...]."""
        if groups % self.chunks:
            raise UserError(
                f"model.moe.dispatch.chunks={self.chunks} does not divide the {groups} groups of tokens of a "
                "device; choose a divisor"
            )
        size = groups // self.chunks
        return [jax.tree.map(lambda a, i=i: a[i * size : (i + 1) * size], arrays) for i in range(self.chunks)]
