"""Tokens through their experts as one operation, against a loop over assignments in float64."""

from contextlib import contextmanager

import hopper_reference
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from other_platform import traced_as
from routed import plan_of

from moe.kernels import hopper, routed_mlp
from moe.kernels.hopper import target

TOKENS, PER_TOKEN, EXPERTS, TILE, WIDTH, HIDDEN = 10, 3, 4, 4, 5, 6
ASSIGNMENTS = TOKENS * PER_TOKEN
NAMES = ("w_gate", "w_up", "w_down")


@contextmanager
def computed_as(path):
    """On another platform; "hopper" takes the Hopper path, each kernel replaced by what it computes.

    "hopper, wide" does so as for wide experts.
    """
    if not path.startswith("hopper"):
        with traced_as(path):
            yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "fits", lambda *_: True)
        patch.setattr(hopper, "gathers_first", lambda _: path == "hopper, wide")
        for kernel in (
            "product",
            "swiglu_product",
            "swiglu_backward",
            "inward_transposed",
            "weight_gradient",
        ):
            patch.setattr(hopper, kernel, getattr(hopper_reference, kernel))
        yield


@jax.jit(static_argnames="path")
def value_and_gradients(path, x, weights, combine_weight, plan, y_bar):
    def mlp(x, weights, combine_weight):
        return routed_mlp(x, *(weights[name] for name in NAMES), combine_weight, plan)

    with computed_as(path):
        y, pullback = jax.vjp(mlp, x, weights, combine_weight)
        return y, *pullback(y_bar)


@st.composite
def routings(draw):
    """Assignments to some of the experts or to none (-1); K of each token in order, or of any tokens."""
    some = draw(st.lists(st.integers(-1, EXPERTS - 1), min_size=1, max_size=EXPERTS + 1, unique=True))
    expert = draw(st.lists(st.sampled_from(some), min_size=ASSIGNMENTS, max_size=ASSIGNMENTS))
    if draw(st.booleans()):
        return np.repeat(np.arange(TOKENS), PER_TOKEN), np.array(expert), PER_TOKEN
    token = draw(st.lists(st.integers(0, TOKENS - 1), min_size=ASSIGNMENTS, max_size=ASSIGNMENTS))
    return np.array(token), np.array(expert), None


def everything_to(expert, per_token):
    return np.repeat(np.arange(TOKENS), PER_TOKEN), np.full(ASSIGNMENTS, expert), per_token


@pytest.mark.parametrize("path", ["cpu", "cuda", "tpu", "hopper", "hopper, wide"])
@given(routing=routings(), seed=st.integers(0, 2**16))
@example(routing=everything_to(2, per_token=PER_TOKEN), seed=0)
@example(routing=everything_to(EXPERTS - 1, per_token=None), seed=0)
@example(routing=everything_to(-1, per_token=PER_TOKEN), seed=0)
@settings(max_examples=12)
def test_value_and_all_gradients(path, routing, seed):
    token, expert, per_token = routing
    random = np.random.default_rng(seed)
    shapes = {"w_gate": (WIDTH, HIDDEN), "w_up": (WIDTH, HIDDEN), "w_down": (HIDDEN, WIDTH)}
    weights = {name: random.normal(size=(EXPERTS, *s)).astype(np.float32) for name, s in shapes.items()}
    x, y_bar = (random.normal(size=(TOKENS, WIDTH)).astype(np.float32) for _ in range(2))
    combine_weight = random.normal(size=ASSIGNMENTS).astype(np.float32)

    plan = plan_of(token, expert, experts=EXPERTS, tile=TILE, per_token=per_token)
    y, x_bar, weights_bar, weight_bar = value_and_gradients(path, x, weights, combine_weight, plan, y_bar)
    expected = naive.experts(x, token, expert, combine_weight, expert >= 0, weights, y_bar)
    got = (y, x_bar, weight_bar, weights_bar)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-4), got, expected)


def test_on_hopper_only_what_enters_swiglu_is_kept_beside_the_arguments(monkeypatch):
    monkeypatch.setattr(target, "present", lambda: True)
    width, hidden, tile = 256, 128, 128
    token, expert, _ = everything_to(0, PER_TOKEN)
    plan = plan_of(token, expert, experts=EXPERTS, tile=tile, per_token=PER_TOKEN)
    x = jnp.zeros((TOKENS, width), jnp.bfloat16)
    w_gate, w_up = jnp.zeros((2, EXPERTS, width, hidden), jnp.bfloat16)
    w_down = jnp.zeros((EXPERTS, hidden, width), jnp.bfloat16)
    arguments = (x, w_gate, w_up, w_down, jnp.zeros(ASSIGNMENTS), plan)

    kept = jax.eval_shape(lambda *arguments: jax.vjp(routed_mlp, *arguments)[1], *arguments)
    rows = plan.assignment.shape[0]
    h = jax.ShapeDtypeStruct((rows, 2 * hidden), jnp.bfloat16)
    expected = jax.tree.leaves((arguments, h))
    assert sorted((a.shape, a.dtype.name) for a in jax.tree.leaves(kept)) == sorted(
        (a.shape, a.dtype.name) for a in expected
    )
