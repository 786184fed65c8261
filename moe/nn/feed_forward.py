"""SwiGLU feed-forward: one for all tokens (dense layers, shared experts), or one for each expert."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.dispatch import Dispatch, Dispatched, ExpertFunction
from moe.kernels import Groups, Plan, expert_mlp, linear, routed_mlp, touched_mlp
from moe.nn.parameter import normal, use
from moe.routing import Routing


class FeedForward(nnx.Module):
    """(silu(x w_gate) * (x w_up)) w_down (SwiGLU, 2002.05202 eq. 5), without biases."""

    def __init__(self, width: int, hidden: int, *, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.w_gate = normal(rngs.params(), (width, hidden), ("embed", "mlp"), width**-0.5)
        self.w_up = normal(rngs.params(), (width, hidden), ("embed", "mlp"), width**-0.5)
        self.w_down = normal(rngs.params(), (hidden, width), ("mlp", "embed"), out_std * hidden**-0.5)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The same function for every token."""
        gate = linear(x, use(self.w_gate, self.dtype, None, "mlp"))
        up = linear(x, use(self.w_up, self.dtype, None, "mlp"))
        return linear(jax.nn.silu(gate) * up, use(self.w_down, self.dtype, "mlp"))


def _rows(weights: dict, rows: Float[Array, "R D"], groups: Groups) -> Float[Array, "R D"]:
    return expert_mlp(rows, weights["w_gate"], weights["w_up"], weights["w_down"], groups)


def _tokens(weights: dict, x: Float[Array, "T D"], combine_weight: Float[Array, "A"], plan: Plan):
    return routed_mlp(x, weights["w_gate"], weights["w_up"], weights["w_down"], combine_weight, plan)


def _assignments(weights: dict, x: Float[Array, "T D"], expert: Int[Array, "A"], plan: Plan):
    return touched_mlp(x, weights["w_gate"], weights["w_up"], weights["w_down"], expert, plan)


SWIGLU_EXPERTS = ExpertFunction(of_rows=_rows, of_tokens=_tokens, of_assignments=_assignments)


class Experts(nnx.Module):
    """E SwiGLU feed-forwards of one width, stacked along the expert axis."""

    def __init__(
        self, num_experts: int, hidden: int, width: int, *, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        inward, outward = (num_experts, width, hidden), (num_experts, hidden, width)
        self.w_gate = normal(rngs.params(), inward, ("expert", "expert_embed", "mlp"), width**-0.5)
        self.w_up = normal(rngs.params(), inward, ("expert", "expert_embed", "mlp"), width**-0.5)
        self.w_down = normal(
            rngs.params(), outward, ("expert", "mlp", "expert_embed"), out_std * hidden**-0.5
        )
        self.num_experts = num_experts
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "groups T D"],
        routing: Routing,
        dispatch: Dispatch,
        num_experts: int,
        *,
        first_expert: int = 0,
        keep_outputs: bool = False,
    ) -> Dispatched:
        """Each token through those of its experts that are held here (see `Dispatch`)."""
        return dispatch(
            x,
            routing,
            self.weights(),
            SWIGLU_EXPERTS,
            first_expert=first_expert,
            num_experts=num_experts,
            keep_outputs=keep_outputs,
        )

    def weights(self) -> dict[str, Float[Array, "E ..."]]:
        """The matrices in compute precision, split over experts and hidden units: what a dispatch carries."""
        return {
            "w_gate": use(self.w_gate, self.dtype, "expert", None, "mlp"),
            "w_up": use(self.w_up, self.dtype, "expert", None, "mlp"),
            "w_down": use(self.w_down, self.dtype, "expert", "mlp"),
        }


class MixedExperts(nnx.Module):
    """Experts of several widths: a stack and a dispatch for each width, so that none is padded."""

    def __init__(
        self,
        classes: tuple[tuple[int, int], ...],
        width: int,
        *,
        out_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.stacks = nnx.List(
            [Experts(*each, width, out_std=out_std, dtype=dtype, rngs=rngs) for each in classes]
        )

    def __call__(
        self,
        x: Float[Array, "groups T D"],
        routing: Routing,
        dispatch: Dispatch,
        num_experts: int,
        *,
        keep_outputs: bool = False,
    ) -> Dispatched:
        """See `Experts`; the stacks number their experts one after the other."""
        parts, first = [], 0
        for stack in self.stacks:
            parts.append(
                stack(x, routing, dispatch, num_experts, first_expert=first, keep_outputs=keep_outputs)
            )
            first += stack.num_experts
        return functools.reduce(_together, parts)


def _together(a: Dispatched, b: Dispatched) -> Dispatched:
    """What two sets of experts gave for the same assignments, each of which one set at most holds."""
    outputs = None if a.outputs is None or b.outputs is None else a.outputs + b.outputs
    return Dispatched(a.y + b.y, a.dropped | b.dropped, outputs)
