"""Tokens through their experts and summed by combine weight, as one operation: gather, SwiGLU, combine.

Hopper   the gather is part of the products unless experts are wide, SwiGLU and its derivative are in
         their epilogues; int8 matrices have kernels of their own, without gradients
other    `gather_rows`, `expert_mlp`, `combine_rows`
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.kernels import hopper
from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.int8_rows import int8_rows_fit, int8_rows_mlp
from moe.kernels.permute import Plan, combine_rows, gather_rows, sum_by_token


def routed_mlp(
    x: Float[Array, "T D"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    combine_weight: Float[Array, "A"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """Sum over each token's assignments of weight * ((silu(x w_gate) * (x w_up)) w_down).

    Differentiable in all five arrays. On Hopper the backward pass keeps, beside its arguments, only what
    enters SwiGLU [R, 2 F]: neither the gathered tokens nor the experts' outputs (as SonicMoE, 2512.14080).
    """
    if hopper.fits(plan.groups, x, w_gate, w_up, w_down):
        return _on_hopper(x, w_gate, w_up, w_down, combine_weight, plan)
    if int8_rows_fit(plan.groups, x, w_gate, w_up, w_down):
        rows = int8_rows_mlp(x, w_gate, w_up, w_down, plan.groups, plan.row_token(padding=0))
        return sum_by_token(rows, plan, x.shape[0], combine_weight)
    return reference(x, w_gate, w_up, w_down, combine_weight, plan)


def reference(x, w_gate, w_up, w_down, combine_weight, plan: Plan) -> Float[Array, "T D"]:
    """The same from three operations."""
    rows = expert_mlp(gather_rows(x, plan), w_gate, w_up, w_down, plan.groups)
    return combine_rows(rows, combine_weight, plan, x[:, 0])


@jax.custom_vjp
def _on_hopper(x, w_gate, w_up, w_down, combine_weight, plan):
    return _products(x, w_gate, w_up, w_down, combine_weight, plan, keep=False)[0]


def _products(x, w_gate, w_up, w_down, combine_weight, plan, *, keep):
    rows, token = _by_row(x, plan, w_down)
    hidden, h = hopper.swiglu_product(rows, w_gate, w_up, plan.groups, token=token, keep=keep)
    rows = hopper.product(hidden, w_down, plan.groups)
    return sum_by_token(rows, plan, x.shape[0], combine_weight), h


def _forward(x, w_gate, w_up, w_down, combine_weight, plan):
    y, h = _products(x, w_gate, w_up, w_down, combine_weight, plan, keep=True)
    return y, (x, w_gate, w_up, w_down, combine_weight, plan, h)


def _backward(saved, y_bar):
    x, w_gate, w_up, w_down, combine_weight, plan, h = saved
    groups, weight = plan.groups, plan.row_weight(combine_weight).astype(jnp.float32)
    rows_bar, token = _by_row(y_bar, plan, w_down)
    h_bar, weighted, weight_bar = hopper.swiglu_backward(rows_bar, w_down, h, weight, groups, token=token)
    (w_down_bar,) = hopper.weight_gradient(weighted, rows_bar, groups, y_token=token)
    rows, token = _by_row(x, plan, w_down)
    w_gate_bar, w_up_bar = hopper.weight_gradient(rows, h_bar, groups, matrices=2, x_token=token)
    x_bar = sum_by_token(hopper.inward_transposed(h_bar, w_gate, w_up, groups), plan, x.shape[0])
    combine_weight_bar = plan.from_rows(weight_bar).astype(combine_weight.dtype)
    return x_bar, w_gate_bar, w_up_bar, w_down_bar, combine_weight_bar, None


def _by_row(x, plan, w_down):
    """The rows of x, or x and the token of each row where the kernels' loads are to gather them."""
    token = plan.row_token(padding=0)
    if hopper.gathers_first(w_down.shape[1]):
        return x.at[token].get(mode="promise_in_bounds"), None
    return x, token


_on_hopper.defvjp(_forward, _backward)
