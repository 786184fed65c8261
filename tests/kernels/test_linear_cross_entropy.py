"""The fused cross-entropy, whole or in chunks, against a loop in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from other_platform import traced_as

from moe.kernels import linear_cross_entropy
from moe.mesh import spec

BATCH, SEQUENCE, WIDTH, VOCABULARY = 8, 12, 4, 7
TOKENS = BATCH * SEQUENCE


@jax.jit(static_argnames=("chunks", "platform"))
def value_and_gradients(hidden, head, targets, chunks, platform="cpu"):
    def scaled(hidden, head):
        mean, nll = linear_cross_entropy(hidden, head, targets, chunks)
        return 3.0 * mean, nll  # a cotangent other than one

    with traced_as(platform):
        return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(hidden, head)


def naive(hidden, head, targets):
    """nll [B, S], and the gradients of 3 * mean, token by token."""
    nll = np.zeros((BATCH, SEQUENCE))
    hidden_bar, head_bar = np.zeros(hidden.shape), np.zeros(head.shape)
    for b in range(BATCH):
        for s in range(SEQUENCE):
            logits = hidden[b, s].astype(np.float64) @ head.astype(np.float64)
            log_share = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            nll[b, s] = -log_share[targets[b, s]]
            logits_bar = 3 / TOKENS * (np.exp(log_share) - np.eye(VOCABULARY)[targets[b, s]])
            head_bar += np.outer(hidden[b, s], logits_bar)
            hidden_bar[b, s] = head @ logits_bar
    return nll, hidden_bar, head_bar


@pytest.mark.parametrize(
    ("mesh", "chunks", "platform"),
    [
        *itertools.product(["1x1", "8x1", "2x4"], [1, 4, 12], ["cpu"]),
        *itertools.product(["1x1", "2x4"], [4], ["cuda"]),
    ],
    indirect=["mesh"],
)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 1.0, 50.0]))
@settings(max_examples=8)
def test_against_a_loop(mesh, chunks, platform, seed, scale):
    random = np.random.default_rng(seed)
    head = scale * random.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
    hidden = random.normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (BATCH, SEQUENCE))
    on_mesh = (jax.device_put(hidden, spec("batch")), head, jax.device_put(targets, spec("batch")))
    (value, nll), (hidden_bar, head_bar) = value_and_gradients(*on_mesh, chunks, platform)

    naive_nll, naive_hidden_bar, naive_head_bar = naive(hidden, head, targets)
    np.testing.assert_allclose(nll, naive_nll, rtol=1e-4, atol=1e-4 * scale)
    assert float(value) == pytest.approx(3 * naive_nll.mean(), rel=1e-4)
    np.testing.assert_allclose(hidden_bar, naive_hidden_bar, rtol=1e-3, atol=1e-5 * scale)
    np.testing.assert_allclose(head_bar, naive_head_bar, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_extreme_logits_give_finite_gradients(one_device, platform):
    hidden = jnp.full((BATCH, SEQUENCE, WIDTH), 1e4)
    head = jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, VOCABULARY)), jnp.float32)
    (value, _), gradients = value_and_gradients(hidden, head, np.zeros((BATCH, SEQUENCE), int), 4, platform)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients)
