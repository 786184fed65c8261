"""Plans over assignments that a test gives to experts at will."""

import numpy as np

from moe.kernels import Groups, Plan, rows_needed


def plan_of(token, expert, *, experts: int, tile: int, per_token: int | None = None) -> Plan:
    """Rows expert by expert, each group filled up to whole tiles; the assignment to expert -1 is dropped."""
    sizes = np.bincount(expert[expert >= 0], minlength=experts)
    padded = -(-sizes // tile) * tile
    free = np.cumsum(padded) - padded
    rows = rows_needed(len(expert), experts, tile)
    row = np.full(len(expert), rows)
    for a, e in enumerate(expert):
        if e >= 0:
            row[a] = free[e]
            free[e] += 1
    row, token, sizes = (a.astype(np.int32) for a in (row, token, sizes))
    return Plan.build(row, token, expert < 0, Groups(sizes, tile), rows, per_token)
