"""Loads of experts: the same numbers for every library, as uneven as they claim to be."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.grouped_matmul_jax import rows_held
from benchmarks.gpu.shapes import (
    MATMULS,
    ROUTINGS,
    LayerShape,
    group_sizes,
    projection,
    projections,
    router_bias,
    shares,
)
from moe.kernels import Groups

layers = st.builds(
    lambda experts, k, tokens: LayerShape("any", tokens, 8, 4, experts, min(k, experts)),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 3000),
)


@given(layers, st.sampled_from(ROUTINGS))
def test_sizes_are_a_routing_that_top_k_could_make(layer, routing):
    sizes = group_sizes(layer, routing)
    assert sizes.sum() == layer.assignments
    assert sizes.min() >= 0
    assert sizes.max() <= layer.tokens


@given(layers)
def test_zipf_shares_fall_as_one_over_rank_below_all_tokens(layer):
    share = np.sort(shares(layer, "Zipf"))[::-1]
    assert share.sum() == pytest.approx(layer.k)
    rank = np.arange(1, layer.experts + 1)
    below = share < 1 - 1e-9
    scaled = (share * rank)[below]
    assert scaled == pytest.approx(np.full(scaled.shape, scaled.max(initial=0)))


@pytest.mark.parametrize("layer", MATMULS.values(), ids=MATMULS)
def test_uniform_groups_are_equal(layer):
    assert set(group_sizes(layer, "uniform")) == {layer.assignments // layer.experts}


@pytest.mark.parametrize("name", ["olmoe", "mixtral"])
def test_bias_brings_about_the_zipf_shares(name):
    layer = MATMULS[name]
    logits = np.random.default_rng(7).standard_normal((4096, layer.experts)) + router_bias(layer, "Zipf")
    chosen = np.argsort(-logits, axis=1)[:, : layer.k]
    share = np.bincount(chosen.reshape(-1), minlength=layer.experts) / len(logits)
    assert share == pytest.approx(shares(layer, "Zipf"), abs=0.03)


def test_projections_have_the_operations_of_the_layer():
    for case_up, case_down in zip(*[iter(projections(MATMULS))] * 2, strict=True):
        up, down = (projection(case, quick=False) for case in (case_up, case_down))
        assert up.flops() + down.flops() == up.layer.flops(backward=False)
        assert (up.inner, up.outer, down.outer) == (up.layer.width, 2 * down.inner, up.layer.width)
        assert up.name == case_up["name"] != down.name


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.sampled_from([1, 8, 16]))
def test_rows_held_are_those_of_the_groups(sizes, tile):
    sizes = np.array(sizes, np.int32)
    held = rows_held(sizes, tile)
    groups = Groups(jnp.asarray(sizes), tile)
    starts = np.asarray(groups.starts())
    expected = {int(start) + i for start, size in zip(starts, sizes, strict=True) for i in range(size)}
    assert set(np.flatnonzero(held)) == expected
