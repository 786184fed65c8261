"""Few tokens through their experts, without gradients: no weight is read but those of experts in use.

A decode step brings an expert a row or two, so reading weights is all that takes time. On the CPU

few assignments   one after the other, in int8 from where the matrices lie (`moe.kernels.cpu`), else each with
                  a copy of its expert's matrices that stays in the caches
more              a loop over tiles of rows, each of one expert, as in `expert_mlp` but for gate and up,
                  which are joined there: little beside a batch of training, but it reads every expert

On CUDA cards

few, quantised    every assignment by itself (`moe.kernels.vector_triton`), without a plan
more, on Hopper   products whose tiles have as few rows as an expert (`moe.kernels.hopper.few_rows`)
many              the grouped products of training, in which an expert without rows costs nothing

Few rows are not rounded under a dynamic format: reading matrices takes the time, so it would gain nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.kernels import hopper
from moe.kernels.cpu import few_rows as cpu
from moe.kernels.device import present_device
from moe.kernels.expert_mlp import expert_mlp, swiglu
from moe.kernels.permute import Plan, assignment_rows, gather_rows
from moe.kernels.quantized_matmul import quantized_matmul
from moe.kernels.tiles import TileLoop
from moe.kernels.vector_triton import vector_product, vector_swiglu, vectors_fit
from moe.quant.matrix import QuantizedMatrix

ONE_BY_ONE = 16  # assignments; with more, an expert is read too often
SELDOM_TWICE = 4  # experts for each assignment: then hardly any expert is read for two
MOST_VECTORS = 256  # assignments where the alternative unpacks every matrix
SMALLEST_TILE, LARGEST_TILE = 2, 64  # rows


def touched_mlp(
    x: Float[Array, "T D"],
    w_gate: Float[Array, "E D F"] | QuantizedMatrix,
    w_up: Float[Array, "E D F"] | QuantizedMatrix,
    w_down: Float[Array, "E F D"] | QuantizedMatrix,
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
    if _by_vectors(expert.shape[0], x, w_gate, w_up, w_down):
        return _vectors(x, w_gate, w_up, w_down, expert, plan)
    if platform() != "cpu":
        few = plan.groups.tile <= LARGEST_TILE and _few_rows_fit(x, w_gate, w_up, w_down)
        return (_few_rows if few else reference)(x, w_gate, w_up, w_down, expert, plan)
    compute = _one_by_one if expert.shape[0] <= ONE_BY_ONE else _tile_by_tile
    return compute(x, w_gate, w_up, w_down, expert, plan)


def reference(x, w_gate, w_up, w_down, expert, plan: Plan) -> Float[Array, "A D"]:
    """The same as grouped products."""
    return assignment_rows(expert_mlp(gather_rows(x, plan), w_gate, w_up, w_down, plan.groups), plan)


def tile_for(
    assignments: int, experts: int, x: Float[Array, "T D"], *matrices: Float[Array, "E ..."]
) -> int | None:
    """Rows of a tile that suit these, or None where `touched_mlp` is no better than `routed_mlp`.

    On CPUs and TPUs a power of two, as many as an expert has in the mean: the kernel of TPUs takes groups of
    any length, and as many rows at a time as divide the buffer.

    Args:
        assignments: to all experts.
        experts: on all devices.
        x: the tokens.
        matrices: of the experts here.
    """
    if platform() == "gpu":
        if _by_vectors(assignments, x, *matrices):
            return SMALLEST_TILE  # of a plan whose rows nobody uses
        return hopper.few_rows_tile(assignments, experts) if _few_rows_fit(x, *matrices) else None
    mean = -(-assignments // experts)
    return min(max(1 << (mean - 1).bit_length(), SMALLEST_TILE), LARGEST_TILE)


def platform() -> str:
    """Where what is traced now will run: "cpu", "gpu" or "tpu"."""
    return present_device().platform


def _by_vectors(assignments: int, x, *matrices) -> bool:
    """Whether the assignments are so few that each is multiplied by itself."""
    if platform() != "gpu" or not vectors_fit(x, *matrices):
        return False
    if _few_rows_fit(x, *matrices):
        return SELDOM_TWICE * assignments <= matrices[0].shape[0]
    return assignments <= MOST_VECTORS


def _few_rows_fit(x, *matrices) -> bool:
    """Whether Hopper's kernels take these: plain matrices, or int8 with one scale for each column."""
    for w in matrices:
        if isinstance(w, QuantizedMatrix) and (w.format.codes == "fp8" or w.scales.shape[-1] > 1):
            return False
    return hopper.few_rows_fit(x, *(_stored(w)[0] for w in matrices))


def _vectors(x, w_gate, w_up, w_down, expert, plan):
    return vector_product(vector_swiglu(x, w_gate, w_up, plan.token, expert), w_down, expert)


def _few_rows(x, w_gate, w_up, w_down, expert, plan):
    (gate, gate_scale), (up, up_scale), (down, down_scale) = map(_stored, (w_gate, w_up, w_down))
    scales = gate_scale, up_scale
    hidden = hopper.few_rows_swiglu(gather_rows(x, plan), gate, up, plan.groups, scales=scales)
    return assignment_rows(hopper.few_rows_product(hidden, down, plan.groups, scale=down_scale), plan)


def _stored(w):
    """A matrix as the kernels take it, and the scales of its columns."""
    if isinstance(w, QuantizedMatrix):
        return w.values, w.scales[..., 0].astype(jnp.float32)
    return w, None


def _one_by_one(x, w_gate, w_up, w_down, expert, plan):
    if cpu.fits(w_gate, w_up, w_down):
        return cpu.swiglu_experts(x[plan.token], w_gate, w_up, w_down, expert).astype(x.dtype)
    here = (expert >= 0) & (expert < w_gate.shape[0])
    known = jnp.where(here, expert, 0)
    at_once = 2 - len(expert) % 2  # so that both cores have something

    def body(i, out):
        for a in (i * at_once + j for j in range(at_once)):
            # Of one bf16 row XLA's CPU product is many times slower than of two.
            rows = jnp.broadcast_to(x[plan.token[a]], (2, x.shape[1]))
            hidden = swiglu(_times(rows, w_gate[known[a]]), _times(rows, w_up[known[a]]))
            out = out.at[a].set(_times(hidden, w_down[known[a]])[0])
        return out

    # A loop, and not a line of products: copies of the matrices then share a place that stays mapped.
    out = jnp.zeros_like(x, shape=(len(expert), x.shape[1]))
    return jnp.where(here[:, None], jax.lax.fori_loop(0, len(expert) // at_once, body, out), 0)


def _tile_by_tile(x, w_gate, w_up, w_down, expert, plan):
    rows = gather_rows(x, plan)
    loop = TileLoop.over(plan.groups, rows.shape[0], at_once=1)

    def body(i, out):
        tile, expert = loop.rows(rows, i)[0], loop.experts[i]
        hidden = swiglu(_times(tile, w_gate[expert]), _times(tile, w_up[expert]))
        return loop.put(out, _times(hidden, w_down[expert])[None], i)

    return assignment_rows(loop.run(body, jnp.zeros_like(rows)), plan)


def _times(rows, w):
    """Rows with the matrix of one expert, quantised or not."""
    return quantized_matmul(rows, w) if isinstance(w, QuantizedMatrix) else rows @ w
