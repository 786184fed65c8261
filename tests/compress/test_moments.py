"""Second moments of a small model's inputs, and matrices rounded by them."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small import BATCHES, CONFIG, TOKENS, VISITED, on, placed

from moe.compress import moments
from moe.compress.calibrate import round_by, with_visits
from moe.compress.moments import make_moment_step
from moe.nn import structure
from moe.nn.quantized import quantize_params
from moe.quant import Format, dequantize
from moe.training.evaluate import to_devices

INT4 = Format("int4", 8)
EXPERTS = ("stacks", 1, "blocks", 0, "moe", "experts", "stacks")  # of two widths


@cache
def found_on(mesh, config):
    """Moments over the batch taken twice, and the final hidden states."""
    with on(mesh):
        _, params, controllers = placed()
        graph, _ = structure(config)
        found = moments.measure(
            make_moment_step(graph, config.dtype, chunks=2), params, controllers, BATCHES * 2
        )
        model = nnx.merge(graph, params, controllers)
        hidden, _ = jax.jit(lambda model, x: model(x))(model, to_devices(TOKENS[:, :-1]))
        return jax.device_get(found), np.asarray(jax.sharding.reshard(hidden, jax.P()))


def test_moments_of_the_first_and_the_last_matrix():
    found, hidden = found_on("1x1", CONFIG)
    with on("1x1"):
        _, params, _ = placed()
        x = np.asarray(params["embedding"][...], np.float64)[TOKENS[:, :-1]].reshape(-1, 16)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
    for name in ("w_q", "w_k", "w_v"):
        of_layer = found["stacks", 0, "blocks", 0, "attention", name][0]
        np.testing.assert_allclose(of_layer, 2 * normed.T @ normed, rtol=1e-4, atol=1e-3)
    last = hidden.reshape(-1, 16)
    np.testing.assert_allclose(found["head",], 2 * last.T @ last, rtol=1e-4, atol=1e-3)


def test_every_token_is_seen_by_its_experts_and_where_it_visits():
    """Summed over experts, the moments of inward matrices count every token K times, then K + 1 times."""
    (own, y), (both, visited_y) = found_on("1x1", CONFIG), found_on("1x1", VISITED)
    np.testing.assert_allclose(visited_y, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both["head",], own["head",], rtol=1e-3, atol=1e-3)
    for layer in (0, 1):
        twice, thrice = (sum(f[*EXPERTS, j, "w_gate"][layer].sum(0) for j in (0, 1)) for f in (own, both))
        np.testing.assert_allclose(thrice, 1.5 * twice, rtol=1e-3, atol=1e-3)
        for j in (0, 1):
            more = both[*EXPERTS, j, "w_down"] - own[*EXPERTS, j, "w_down"]
            assert np.all(np.einsum("ledd->le", more) > 0)
    gate = (*EXPERTS, 0, "w_gate")
    weighed = with_visits(own, both, visits=10.0)
    np.testing.assert_allclose(weighed[gate], own[gate] + 1.6 * (both[gate] - own[gate]), rtol=1e-5)


def test_moments_are_the_same_on_eight_devices():
    (one, _), (eight, _) = found_on("1x1", VISITED), found_on("4x2", VISITED)
    assert one.keys() == eight.keys()
    for path in one:
        np.testing.assert_allclose(eight[path], one[path], rtol=1e-3, atol=1e-3, err_msg=str(path))


def test_rounding_by_moments_keeps_the_layout_and_lowers_the_output_error():
    found, _ = found_on("4x2", VISITED)
    with on("4x2"):
        _, params, _ = placed()
        nearest = quantize_params(params, INT4, jnp.dtype("float32"))
        calibrated = round_by(params, found, INT4, jnp.dtype("float32"))
        assert jax.tree.structure(calibrated) == jax.tree.structure(nearest)
        for a, b in zip(jax.tree.leaves(calibrated), jax.tree.leaves(nearest), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
            assert a.dtype == b.dtype
        path, errors = (*EXPERTS, 1, "w_down"), []
        for state in (nearest, calibrated):
            w, value = (dict(nnx.to_flat_state(each))[path] for each in (params, state))
            off = np.asarray(dequantize(value.get_value())) - np.asarray(w[...])
            errors.append(np.einsum("ledf,lecd,lecf->", off, found[path], off))
    assert errors[1] < 0.8 * errors[0]
