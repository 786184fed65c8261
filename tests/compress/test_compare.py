"""Comparison of two sets of parameters, and sensitivity, on a small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import BATCHES, CONFIG, TOKENS, on, placed

from moe.compress.compare import compare, make_comparison_step
from moe.compress.sensitivity import sensitivity
from moe.nn.quantized import quantize_params
from moe.quant import Format
from moe.training.evaluate import to_devices

INT4 = Format("int4", 8)


def log_probabilities(graph, params, controllers):
    model = nnx.merge(graph, params, controllers)
    hidden, _ = jax.jit(lambda model, x: model(x))(model, to_devices(TOKENS[:, :-1]))
    logits = np.asarray(jax.sharding.reshard(model.logits(hidden), jax.P()), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("mesh", ["1x1", "4x2"])
def test_a_comparison_is_that_of_the_probabilities(mesh):
    with on(mesh):
        graph, params, controllers = placed()
        rounded = quantize_params(params, INT4, jnp.dtype("float32"))
        step = make_comparison_step(graph, chunks=2)
        found = compare(step, params, rounded, controllers, BATCHES, jnp.arange(24))
        p, q = (log_probabilities(graph, each, controllers)[:7] for each in (params, rounded))
    targets = TOKENS[:7, 1:]
    for sums, logs in ((found.before, p), (found.after, q)):
        expected = -np.take_along_axis(logs, targets[..., None], -1)[..., 0].sum(1)
        np.testing.assert_allclose(sums, expected, rtol=1e-4)
    np.testing.assert_allclose(found.divergence, (np.exp(p) * (p - q)).sum((1, 2)), rtol=1e-2, atol=1e-4)
    np.testing.assert_array_equal(found.agreed, (p.argmax(-1) == q.argmax(-1)).sum(1))
    np.testing.assert_array_equal(found.targets, 12.0)
    np.testing.assert_array_equal(found.text_bytes, targets.sum(1))
    summary = found.summary()
    assert summary["loss_before"] == pytest.approx(found.before.sum() / 84)
    assert summary["relative_increase"] == pytest.approx(found.after.sum() / found.before.sum() - 1)
    assert 0 < summary["divergence"] < 1
    assert 0.3 < summary["agreement"] < 1


def parts_changed(params, mixed) -> set[tuple]:
    """(layer, expert or name of a matrix) of every number that differs."""
    parts = set()
    for (path, old), (_, new) in zip(nnx.to_flat_state(params), nnx.to_flat_state(mixed), strict=True):
        different = np.asarray(old[...]) != np.asarray(new[...])
        if path[0] != "stacks":
            parts |= {(None, path[-1])} if different.any() else set()
            continue
        for index in np.argwhere(different.reshape(*different.shape[:2], -1).any(-1)):
            expert = index[1] + 2 * path[-2] if "expert" in old.get_metadata("out_sharding") else path[-1]
            parts.add((path[1] + index[0], expert))
    return parts


@pytest.mark.parametrize("mesh", ["1x1", "4x2"])
def test_sensitivity_rounds_one_part_and_no_other(mesh):
    """The divergence that is asked for counts the calls, and looks at what was changed."""
    seen = []

    def divergence(mixed) -> float:
        seen.append(parts_changed(params, mixed))
        return float(len(seen))

    with on(mesh):
        _, params, _ = placed()
        found = sensitivity(params, INT4, CONFIG, divergence)

    assert found.head == 1.0
    assert found.layers == [2.0, 3.0, 4.0]
    assert found.experts == {1: [5.0, 6.0, 7.0, 8.0], 2: [9.0, 10.0, 11.0, 12.0]}
    attention, dense = {"w_q", "w_k", "w_v", "w_out"}, {"w_gate", "w_up", "w_down"}
    assert seen[0] == {(None, "head")}
    assert seen[1] == {(0, name) for name in attention | dense}
    assert seen[2] == {(1, name) for name in attention | {0, 1, 2, 3}}
    assert seen[4:] == [{(layer, expert)} for layer in (1, 2) for expert in range(4)]
