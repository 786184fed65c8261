"""Each assignment's place in the queue of its expert, and rows sorted by expert."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from moe.kernels import Groups, Plan, layout_triton, rows_needed

BLOCK = 32  # assignments compared with each other: as many as the CPU's vectors take at once


def queues(expert: Int[Array, "A"], num_experts: int) -> tuple[Int[Array, "A"], Int[Array, "E"]]:
    """How many earlier assignments go to the same expert, and how many go to each in all.

    A counting sort: the assignments of a block are compared with each other, and only counts are summed over
    the blocks, so that nothing of A * E numbers is held and nothing is sorted.

    Args:
        expert: of each assignment; those beyond the last count for nobody, and their rank means nothing.
        num_experts: E.
    """
    padding = -expert.shape[0] % BLOCK
    blocks = jnp.pad(expert, (0, padding), constant_values=num_experts).reshape(-1, BLOCK)
    # Summed over the middle axis: a GPU's threads then sum by themselves, without each other.
    counts = jnp.sum(blocks[:, :, None] == jnp.arange(num_experts), axis=1, dtype=jnp.int32)
    until = jnp.cumsum(counts, axis=0)
    before = jnp.take_along_axis(until - counts, blocks, axis=1, mode="clip")
    earlier = jnp.arange(BLOCK)[:, None] < jnp.arange(BLOCK)
    within = jnp.sum((blocks[:, :, None] == blocks[:, None, :]) & earlier, axis=1, dtype=jnp.int32)
    return (before + within).reshape(-1)[: expert.shape[0]], until[-1]


def by_expert(
    expert: Int[Array, "A"],
    token: Int[Array, "A"],
    num_experts: int,
    tile: int,
    per_token: int | None,
    *,
    most: int | None = None,
) -> Plan:
    """Rows sorted by expert, as many for each as it has assignments (MegaBlocks 2211.15841).

    Args:
        expert: of each assignment; one that is not among the first `num_experts` has no row.
        token: of each assignment.
        num_experts: E.
        tile: rows in which experts' groups are padded.
        per_token: see `Plan`.
        most: assignments that have a row, at most; None for all.
    """
    rows = rows_needed(expert.shape[0] if most is None else most, num_experts, tile)
    if layout_triton.fits(expert.shape[0]):
        row, assignment, layout = layout_triton.lay_out(expert, num_experts, tile, rows)
        return Plan(row, token, assignment, jnp.zeros_like(row, bool), layout, per_token)
    here = (expert >= 0) & (expert < num_experts)
    expert = jnp.where(here, expert, num_experts)
    rank, sizes = queues(expert, num_experts)
    layout = Groups(sizes, tile)
    start = layout.starts().at[expert].get(mode="fill", fill_value=0)
    row = jnp.where(here, start + rank, rows)
    return Plan.build(row, token, jnp.zeros_like(here), layout, rows, per_token)
