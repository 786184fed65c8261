"""Training for quantised weights: the same on every layout, and not the same as plain training."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_step import BASE, SEQUENCE, Layout, assert_same, distance, outcome

from moe.quant import Quantization

INT4 = Quantization(train="int4-8", rounding="stochastic")


@pytest.mark.parametrize(
    "layout", [Layout("all", remat="full", accumulation=2, chunks=2), Layout("4x2", accumulation=4)], ids=str
)
def test_a_step_does_not_depend_on_the_layout(layout):
    config = replace(BASE, moe=replace(BASE.moe, tokens_per_group=SEQUENCE // 2))
    assert_same(outcome(config, layout, quantization=INT4), outcome(config, Layout(), quantization=INT4))


def test_forward_passes_see_rounded_weights():
    plain, rounded, other = (
        outcome(BASE, Layout(), key, quantization)
        for key, quantization in ((0, Quantization()), (0, INT4), (1, INT4))
    )
    zero = jax.tree.map(np.zeros_like, plain.gradients)
    assert 0.05 < distance(rounded.gradients, plain.gradients) / distance(plain.gradients, zero) < 1
    assert distance(rounded.gradients, other.gradients) > 0.01 * distance(plain.gradients, zero)
