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
        expert: of each assignment; beyond the E experts where it has no row.
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
    """Rows of a tile on CPUs and TPUs: a power of two, as many as an expert has in the mean."""
    mean = -(-assignments // experts)
    return min(max(1 << (mean - 1).bit_length(), SMALLEST_TILE), LARGEST_TILE)


def on_cpu() -> bool:
    """Whether what is traced now will run on the CPU: by the devices of the mesh, if one is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform == "cpu"


def on_tpu() -> bool:
    """The same of TPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.platform == "tpu"


def _one_by_one(x, w_gate, w_up, w_down, expert, plan):
    here = (expert >= 0) & (expert < w_gate.shape[0])
    known = jnp.where(here, expert, 0)
    at_once = 2 - len(expert) % 2  # so that both cores have something

    def body(i, out):
        for a in (i * at_once + j for j in range(at_once)):
            # Of one bf16 row XLA's CPU product is many times slower than of two.
            rows = jnp.broadcast_to(x[plan.token[a]], (2, x.shape[1]))
            hidden = swiglu(rows @ w_gate[known[a]], rows @ w_up[known[a]])
            out = out.at[a].set((hidden @ w_down[known[a]])[0])
        return out

    # A loop, and not a line of products: copies of the matrices then share a place that stays mapped.
    out = jnp.zeros_like(x, shape=(len(expert), x.shape[1]))
    return jnp.where(here[:, None], jax.lax.fori_loop(0, len(expert) // at_once, body, out), 0)


def _tile_by_tile(x, w_gate, w_up, w_down, expert, plan):
    rows = gather_rows(x, plan)
    loop = TileLoop.over(plan.groups, rows.shape[0], at_once=1)

    def body(i, out):
        tile, expert = loop.rows(rows, i)[0], loop.experts[i]
        hidden = swiglu(tile @ w_gate[expert], tile @ w_up[expert])
        return loop.put(out, (hidden @ w_down[expert])[None], i)

    return assignment_rows(loop.run(body, jnp.zeros_like(rows)), plan)
