"""The float32 reference of the MoE layer's benchmark, and what it counts as saved."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu.layer_error import layer_errors
from benchmarks.gpu.moe_layer_jax import saved_bytes

TOKENS, WIDTH, HIDDEN, EXPERTS, K = 24, 6, 5, 4, 2


def layer_in_numpy(x, y_bar, w):
    """Output and gradients, token by token in float64; gradients by the chain rule, written out."""
    y, x_bar = np.zeros_like(x), np.zeros_like(x)
    bars = {name: np.zeros_like(value) for name, value in w.items()}
    for t, token in enumerate(x):
        logits = token @ w["router"]
        chosen = np.argsort(-logits)[:K]
        share = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        out = np.zeros((K, WIDTH))
        for i, e in enumerate(chosen):
            gate, up = token @ w["w_gate"][e], token @ w["w_up"][e]
            sigmoid = 1 / (1 + np.exp(-gate))
            hidden = gate * sigmoid * up
            out[i] = hidden @ w["w_down"][e]
            hidden_bar = share[i] * (w["w_down"][e] @ y_bar[t])
            gate_bar = hidden_bar * up * sigmoid * (1 + gate * (1 - sigmoid))
            up_bar = hidden_bar * gate * sigmoid
            bars["w_down"][e] += np.outer(hidden, share[i] * y_bar[t])
            bars["w_gate"][e] += np.outer(token, gate_bar)
            bars["w_up"][e] += np.outer(token, up_bar)
            x_bar[t] += w["w_gate"][e] @ gate_bar + w["w_up"][e] @ up_bar
        y[t] = share @ out
        share_bar = out @ y_bar[t]
        logits_bar = share * (share_bar - share @ share_bar)
        x_bar[t] += w["router"][:, chosen] @ logits_bar
    return y, x_bar, bars


@pytest.fixture(scope="module")
def exact():
    numbers = np.random.default_rng(0)
    shapes = {
        "router": (WIDTH, EXPERTS),
        "w_gate": (EXPERTS, WIDTH, HIDDEN),
        "w_up": (EXPERTS, WIDTH, HIDDEN),
        "w_down": (EXPERTS, HIDDEN, WIDTH),
    }
    w = {name: numbers.standard_normal(shape) for name, shape in shapes.items()}
    x, y_bar = numbers.standard_normal((2, TOKENS, WIDTH))
    return x, y_bar, w, *layer_in_numpy(x, y_bar, w)


@pytest.mark.parametrize("wrong", [None, "y", "x", "w"])
def test_errors_are_those_of_each_result(exact, wrong):
    x, y_bar, w, y, x_bar, w_bar = exact
    off = {name: 1.01 if name == wrong else 1 for name in "yxw"}
    x, y_bar, y, x_bar = (
        jnp.asarray(a, jnp.float32)[None] for a in (x, y_bar, off["y"] * y, off["x"] * x_bar)
    )
    weights = {name: jnp.asarray(a, jnp.float32) for name, a in w.items()}
    weights_bar = {name: jnp.asarray(off["w"] * a, jnp.float32) for name, a in w_bar.items()}
    errors = layer_errors(x, y_bar, weights, y, x_bar, weights_bar, k=K)
    for name in "yxw":
        assert errors[name] == pytest.approx(0.01 if name == wrong else 0, abs=1e-5)


def test_saved_are_the_bytes_that_are_no_argument_and_counted_once():
    x = jnp.arange(24, dtype=jnp.float32)
    fresh = x + 1
    kept = [x.reshape(4, 6), fresh.reshape(6, 4), fresh, x.astype(jnp.bfloat16)]
    assert saved_bytes(kept, {"x": x.reshape(2, 12)}) == 24 * 4 + 24 * 2
