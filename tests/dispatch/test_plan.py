"""Ranks and loads against a loop over assignments."""

from functools import partial

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe.dispatch.plan import BLOCK, queues

LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7]
counted = jax.jit(queues, static_argnums=1)


def naive_queues(expert, num_experts):
    """Every assignment by itself; None is the rank of one that goes nowhere."""
    ranks, loads = [], [0] * num_experts
    for e in expert:
        here = 0 <= e < num_experts
        ranks.append(loads[e] if here else None)
        if here:
            loads[e] += 1
    return ranks, loads


def check(expert, num_experts):
    rank, load = counted(np.asarray(expert, np.int32), num_experts)
    expected, expected_load = naive_queues(expert, num_experts)
    here = [i for i, r in enumerate(expected) if r is not None]
    np.testing.assert_array_equal(np.asarray(rank)[here], [expected[i] for i in here])
    np.testing.assert_array_equal(load, expected_load)


@pytest.mark.parametrize("num_experts", [1, 6])
@given(st.data())
@settings(max_examples=25)
def test_any_choice_of_experts(num_experts, data):
    """Experts that `num_experts` does not count among them."""
    length = data.draw(st.sampled_from(LENGTHS))
    check(data.draw(arrays.arrays(int, length, elements=st.integers(-1, num_experts))), num_experts)


@given(busy=st.integers(0, 6), length=st.sampled_from(LENGTHS))
@example(busy=6, length=LENGTHS[-1])
@settings(max_examples=10)
def test_everything_goes_to_one_expert_or_nowhere(busy, length):
    check([busy] * length, 6)


def test_many_assignments_to_many_experts():
    """The ranks of each expert's assignments, in their order, are 0, 1, 2 …"""
    expert = np.random.default_rng(0).zipf(1.3, size=100_000) % 512
    rank, load = counted(expert.astype(np.int32), 512)
    np.testing.assert_array_equal(load, np.bincount(expert, minlength=512))
    for e in range(512):
        np.testing.assert_array_equal(np.asarray(rank)[expert == e], np.arange(load[e]))


def test_each_group_counts_for_itself():
    expert = np.random.default_rng(1).integers(0, 6, size=(3, 70))
    rank, load = jax.vmap(partial(queues, num_experts=6))(jnp.asarray(expert))
    for g in range(3):
        expected, expected_load = naive_queues(expert[g], 6)
        np.testing.assert_array_equal(rank[g], expected)
        np.testing.assert_array_equal(load[g], expected_load)
