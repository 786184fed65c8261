"""A dispatch on plain arrays, and the same by a loop over assignments in float64: output and gradients."""

from functools import partial

import hypothesis.extra.numpy as arrays
import jax
import naive
import numpy as np
from hypothesis import strategies as st

from moe.dispatch import Capacity, Dispatch, OneHot
from moe.mesh import spec
from moe.nn.feed_forward import SWIGLU_EXPERTS
from moe.routing import Routing

WIDTH, HIDDEN = 6, 4


@partial(jax.jit, static_argnames=("dispatch", "per_token", "keep_outputs"))
def run(dispatch, per_token, keep_outputs, x, token, expert, combine_weight, weights, y_bar):
    """Output, dropped assignments, each assignment's own output, and gradients, from plain arrays."""
    token, expert = jax.sharding.reshard((token, expert), spec("group"))

    def forward(x, combine_weight, weights):
        x, combine_weight = jax.sharding.reshard((x, combine_weight), spec("group"))
        routing = Routing(token, expert, combine_weight, scores=None, per_token=per_token)
        inward, outward = spec("expert", None, "mlp"), spec("expert", "mlp")
        weights = jax.sharding.reshard(weights, {"w_gate": inward, "w_up": inward, "w_down": outward})
        y, dropped, outputs = dispatch(x, routing, weights, SWIGLU_EXPERTS, keep_outputs=keep_outputs)
        return y, (dropped, outputs)

    y, pullback, aside = jax.vjp(forward, x, combine_weight, weights, has_aux=True)
    return y, *aside, pullback(jax.sharding.reshard(y_bar, spec("group")))


def naive_run(dispatch: Dispatch, per_token, x, token, expert, combine_weight, weights, y_bar):
    """The same, group by group and assignment by assignment."""
    experts = len(weights["w_up"])
    ys, drops, outs, x_bars, weight_bars = [], [], [], [], []
    weights_bar = {name: np.zeros(w.shape) for name, w in weights.items()}
    for group in zip(x, token, expert, combine_weight, y_bar, strict=True):
        x_g, token_g, expert_g, weight_g, y_bar_g = group
        kept = expert_g < experts
        if isinstance(dispatch, Capacity | OneHot):
            rule = (dispatch.capacity_factor, getattr(dispatch, "priority", "position"))
            kept = naive.kept(expert_g, weight_g, per_token, experts, *rule)
        y, x_bar, weight_bar, bars = naive.experts(x_g, token_g, expert_g, weight_g, kept, weights, y_bar_g)
        ys.append(y), x_bars.append(x_bar), weight_bars.append(weight_bar)
        drops.append((expert_g < experts) & ~kept)
        assignments = zip(token_g, expert_g, kept, strict=True)
        outs.append(
            [
                naive.swiglu(x_g[t].astype(np.float64), *(weights[name][e] for name in weights))
                if k
                else np.zeros(WIDTH)
                for t, e, k in assignments
            ]
        )
        weights_bar = {name: weights_bar[name] + bars[name] for name in bars}
    return (
        np.stack(ys),
        np.stack(drops),
        np.array(outs),
        (np.stack(x_bars), np.stack(weight_bars), weights_bar),
    )


def assert_close(actual, expected):
    """Equal to float32 rounding, measured against the largest entry."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(expected).max()))


def check(dispatch, per_token, token, expert, num_experts, tokens_per_group, seed, *, keep_outputs=True):
    """Random tokens, weights and cotangents over a given routing."""
    random = np.random.default_rng(seed)
    groups = len(token)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    inputs = {
        "x": normal(groups, tokens_per_group, WIDTH),
        "token": token.astype(np.int32),
        "expert": expert.astype(np.int32),
        "combine_weight": normal(*token.shape),
        "weights": {
            "w_gate": normal(num_experts, WIDTH, HIDDEN),
            "w_up": normal(num_experts, WIDTH, HIDDEN),
            "w_down": normal(num_experts, HIDDEN, WIDTH),
        },
        "y_bar": normal(groups, tokens_per_group, WIDTH),
    }
    y, dropped, outputs, grads = run(dispatch, per_token, keep_outputs, **inputs)
    naive_y, naive_dropped, naive_outputs, naive_grads = naive_run(dispatch, per_token, **inputs)
    np.testing.assert_array_equal(dropped, naive_dropped)
    assert_close(y, naive_y)
    if keep_outputs:
        assert_close(outputs, naive_outputs)
    jax.tree.map(assert_close, grads, naive_grads)


@st.composite
def experts_of(draw, shape, num_experts):
    """Any choice of experts, "nowhere" included; often from a few experts only, so that others stay empty."""
    some = draw(st.lists(st.integers(0, num_experts), min_size=1, max_size=num_experts + 1, unique=True))
    return np.array(some)[draw(arrays.arrays(int, shape, elements=st.integers(0, len(some) - 1)))]


@st.composite
def routings(draw, groups, tokens_per_group, num_experts, k):
    """Token-major with k assignments a token, or any tokens in any order: some absent, some often."""
    token_major = draw(st.booleans())
    if token_major:
        token = np.tile(np.repeat(np.arange(tokens_per_group), k), (groups, 1))
    else:
        shape = (groups, tokens_per_group * k)
        token = draw(arrays.arrays(int, shape, elements=st.integers(0, tokens_per_group - 1)))
    return k if token_major else None, token, draw(experts_of(token.shape, num_experts))
