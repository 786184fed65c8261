"""Few tokens through their experts, without gradients: no weight is read but those of experts in use.

A decode step brings an expert a row or two, so reading weights is all that takes time. On the CPU

few assignments   one after the other, each with a copy of its expert's matrices that stays in the caches
more              a loop over tiles of rows, each of one expert, as in `expert_mlp` but for gate and up,
                  which are joined there: little beside a batch of training, but it reads every expert

Elsewhere grouped products, in which an expert without rows costs nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.kernels.expert_mlp import expert_mlp, swiglu
from moe.kernels.permute import Plan, assignment_rows, gather_rows
from moe.kernels.tiles import TileLoop

ONE_BY_ONE = 16  # assignments; with more, an expert is read too often
SMALLEST_TILE, LARGEST_TILE = 2, 64  # rows


def touched_mlp(
    x: Float[Array, "T D"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    expert: Int[Array, "A"],
    plan: Plan,
) -> Float[Array, "A D"]:
    """(silu(x w_gate) * (x w_up)) w_down of every assignment, zeros where it has no row.

    Args:
        x: tokens.
        w_gate: of each expert.
        w_up: of each expert.
        w_down: of each expert.
        expert: of each assignment; anything where it has no row.
        plan: its token and its row.
    """
    if not on_cpu():
        return reference(x, w_gate, w_up, w_down, expert, plan)
    compute = _one_by_one if expert.shape[0] <= ONE_BY_ONE else _tile_by_tile
    return compute(x, w_gate, w_up, w_down, expert, plan)


def reference(x, w_gate, w_up, w_down, expert, plan: Plan) -> Float[Array, "A D"]:
    """The same as grouped products."""
    return assignment_rows(expert_mlp(gather_rows(x, plan), w_gate, w_up, w_down, plan.groups), plan)


def tile_for(assignments: int, experts: int) -> int:
    """Rows of a tile on the CPU: a power of two, as many as an expert has in the mean."""
    mean = -(-assignments // experts)
    return min(max(1 << (mean - 1).bit_length(), SMALLEST_TILE), LARGEST_TILE)


def on_cpu() -> bool:
    """Whether what is traced now will run on the CPU: by the devices of the mesh, if one is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform == "cpu"


def _one_by_one(x, w_gate, w_up, w_down, expert, plan):
    here = plan.row < plan.assignment.shape[0]
    expert = jnp.where(here, expert, 0)

    def one(a):
        # Of one bf16 row XLA's CPU product is many times slower than of two.
        row = jnp.broadcast_to(x[plan.token[a]], (2, x.shape[1]))
        hidden = swiglu(row @ w_gate[expert[a]], row @ w_up[expert[a]])
        return (hidden @ w_down[expert[a]])[0]

    y = jnp.stack([one(a) for a in range(len(expert))])
    return jnp.where(here[:, None], y, 0)


def _tile_by_tile(x, w_gate, w_up, w_down, expert, plan):
    rows = gather_rows(x, plan)
    loop = TileLoop.over(plan.groups, rows.shape[0], at_once=1)

    def body(i, out):
        tile, expert = loop.rows(rows, i)[0], loop.experts[i]
        hidden = swiglu(tile @ w_gate[expert], tile @ w_up[expert])
        return loop.put(out, (hidden @ w_down[expert])[None], i)

    return assignment_rows(loop.run(body, jnp.zeros_like(rows)), plan)
