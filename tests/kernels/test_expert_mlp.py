"""The experts' feed-forward over grouped rows against row by row in float64, on every platform."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from other_platform import traced_as, traced_for

from moe.kernels import Groups, expert_mlp, rows_needed

TILE, EXPERTS, ASSIGNMENTS, WIDTH, HIDDEN = 4, 3, 24, 5, 6
ROWS = rows_needed(ASSIGNMENTS, EXPERTS, TILE)
NAMES = ("w_gate", "w_up", "w_down")
GARBAGE = 1e3  # in the padding; its square is still finite


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(platform, tiles_at_once, rows, weights, group_sizes, y_bar):
    """As another platform would compute it, computed here."""

    def mlp(rows, weights):
        return expert_mlp(rows, *(weights[name] for name in NAMES), Groups(group_sizes, TILE))

    with traced_as(platform), pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("moe.kernels.expert_mlp"), "MOST_TILES_AT_ONCE", tiles_at_once)
        y, pullback = jax.vjp(mlp, rows, weights)
        return y, *pullback(y_bar)


@pytest.mark.parametrize(
    ("platform", "tiles_at_once"), [("cpu", 1), ("cpu", 4), ("cpu", 12), ("cuda", 1), ("tpu", 1)]
)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=EXPERTS, max_size=EXPERTS).filter(
        lambda s: sum(s) <= ASSIGNMENTS
    ),
    seed=st.integers(0, 2**16),
)
@example(sizes=[0, 0, 0], seed=0)
@example(sizes=[0, 0, ASSIGNMENTS], seed=0)
@example(sizes=[ASSIGNMENTS, 0, 0], seed=0)
@example(sizes=[4, 4, 4], seed=0)
@settings(max_examples=20)
def test_value_and_gradients(platform, tiles_at_once, sizes, seed):
    random = np.random.default_rng(seed)
    experts = []
    for expert, size in enumerate(sizes):
        experts += [expert] * size + [-1] * (-size % TILE)
    experts = np.array(experts + [-1] * (ROWS - len(experts)))
    used = experts >= 0
    rows, y_bar = (random.normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(2))
    rows[~used], y_bar[~used] = GARBAGE, 0
    shapes = {"w_gate": (WIDTH, HIDDEN), "w_up": (WIDTH, HIDDEN), "w_down": (HIDDEN, WIDTH)}
    weights = {name: random.normal(size=(EXPERTS, *s)).astype(np.float32) for name, s in shapes.items()}

    y, rows_bar, weights_bar = value_and_gradients(
        platform, tiles_at_once, rows, weights, np.array(sizes), y_bar
    )
    token, one = np.arange(ROWS), np.ones(ROWS)
    naive_y, naive_rows_bar, _, naive_weights_bar = naive.experts(
        rows, token, experts, one, used, weights, y_bar
    )
    np.testing.assert_allclose(y[used], naive_y[used], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rows_bar[used], naive_rows_bar[used], rtol=1e-4, atol=1e-4)
    for name in NAMES:
        np.testing.assert_allclose(
            weights_bar[name], naive_weights_bar[name], rtol=1e-4, atol=2e-4, err_msg=name
        )


def test_gradients_of_half_precision_are_summed_in_float32():
    """Two thousand equal rows: their sum in bfloat16 would stop far below."""
    rows = jnp.ones((2048, 2), jnp.bfloat16)
    matrices = [jnp.ones((1, 2, 2), jnp.bfloat16)] * 3
    groups = Groups(jnp.array([2048]), tile=8)
    y, pullback = jax.vjp(lambda *w: expert_mlp(rows, *w, groups), *matrices)
    *_, w_down_bar = pullback(jnp.ones_like(y))
    assert y.dtype == w_down_bar.dtype == jnp.bfloat16
    hidden = naive.silu(2.0) * 2.0
    np.testing.assert_allclose(w_down_bar.astype(np.float32), 2048 * hidden, rtol=0.01)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("card", "width", "kernels"),
    [
        ("NVIDIA A100-SXM4-80GB", 256, "grouped_transpose_product"),
        ("NVIDIA H100 80GB HBM3", 64, "grouped_transpose_product"),
        ("NVIDIA H100 80GB HBM3", 256, "mosaic_gpu"),
        ("Tesla V100-SXM2-16GB", 256, "while"),
    ],
)
def test_gradients_lower_for_cards_that_are_not_here(card, width, kernels):
    def value(rows, *w):
        return expert_mlp(rows, *w[:3], Groups(w[3], 128)).astype(jnp.float32).sum()

    shapes = [(1024, width), *[(EXPERTS, width, width)] * 3]
    arrays = [*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), jax.ShapeDtypeStruct((3,), jnp.int32)]
    with traced_for(card):
        gradients = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3))).trace(*arrays)
        assert kernels in gradients.lower(lowering_platforms=("cuda",)).as_text()
