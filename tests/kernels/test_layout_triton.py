"""Where rows of few assignments lie: the kernel, interpreted, against XLA's way, and that it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from other_platform import traced_for

from moe.dispatch.plan import by_expert
from moe.kernels import rows_needed
from moe.kernels.layout_triton import AT_ONCE, MOST, lay_out

EXPERTS, CARD = 20, "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize("tile", [8, 16])
@pytest.mark.parametrize("count", [1, AT_ONCE, 2 * AT_ONCE + 7])
def test_rows_lie_where_a_plan_puts_them(count, tile):
    random, rows = np.random.default_rng(count), rows_needed(count, EXPERTS, tile)
    run = jax.jit(lambda expert: lay_out(expert, EXPERTS, tile, rows, interpret=True))
    for expert in (
        random.integers(-2, EXPERTS + 3, count),
        np.full(count, 7),
        np.full(count, EXPERTS),
    ):
        found = run(jnp.asarray(expert, jnp.int32))
        plan = by_expert(jnp.asarray(expert), jnp.arange(count), EXPERTS, tile, None)
        np.testing.assert_array_equal(found.row, plan.row)
        np.testing.assert_array_equal(found.assignment, plan.assignment)
        np.testing.assert_array_equal(found.groups.group_sizes, plan.groups.group_sizes)
        assert found.groups.used_tiles() == plan.groups.used_tiles()
        tiles = rows // tile
        np.testing.assert_array_equal(found.groups.tile_experts(tiles), plan.groups.tile_experts(tiles))


@pytest.mark.parametrize(("count", "chosen"), [(MOST, True), (MOST + 1, False)])
def test_a_plan_of_few_assignments_is_one_kernel(count, chosen):
    def plan(expert):
        return by_expert(expert, jnp.arange(count), EXPERTS, 8, None)

    with traced_for(CARD):
        traced = jax.jit(plan).trace(jax.ShapeDtypeStruct((count,), jnp.int32))
        assert ("row_layout" in str(traced.jaxpr)) == chosen
        traced.lower(lowering_platforms=("cuda",))
