"""The interface of dispatch, and the part all dispatches share: gather, experts, combine, across the mesh."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8

from moe.dispatch.auto import Auto
from moe.dispatch.exchange import Exchange, ExpertFunction, ExpertWeights, Work
from moe.dispatch.gather import Gather
from moe.errors import UserError
from moe.kernels import Plan, assignment_rows, combine_rows, gather_rows
from moe.mesh import axes, axis_size, layouts, spec, varying
from moe.routing.assignment import Routing

TILE = 128  # rows of one matrix product of one expert


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

    A dispatch differs from another only in its `plan`, and in what it drops. Over the `expert` mesh axis its
    `exchange` brings tokens to the devices that hold their experts; a device therefore never needs another's
    experts, and no assignment is lost on the way.
    """

    exchange: Exchange = field(default=Auto(), kw_only=True)
    """How tokens travel along `expert`: Gather(), AllToAll(), RaggedAllToAll(), or Auto(), which chooses."""

    chunks: int = field(default=1, kw_only=True)
    """Parts into which a device's tokens are cut. Each travels and is computed by itself, so that one part
    can be on its way along `expert` while another is computed."""

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

    def dropped(self, routing: Routing, num_experts: int) -> Bool[Array, "groups A"]:
        """Which assignments find no room, whatever devices their experts are on.

        Args:
            routing: fields [groups, A].
            num_experts: E, all that the assignments are spread over.
        """
        return jnp.zeros_like(routing.expert, bool)

    @property
    def row_tile(self) -> int:
        """Rows in which experts' groups are padded where rows are sorted by expert."""
        return TILE

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
            split, local_experts = axis_size("expert"), next(iter(weights.values())).shape[0]
            known = num_experts or local_experts * split
            work = Work(self, experts, first_expert, known, keep_outputs)
            here = Routing(*assignments, scores=None, per_token=routing.per_token)
            exchange = self.exchange if split > 1 else Gather()
            y, lost, outputs = exchange(work, x, here, weights)
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
