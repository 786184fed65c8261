"""Schedules at their corners, what decays and what does not, and Muon against itself on single matrices."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import UserError
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, structure
from moe.optim import WSD, AdamW, Cosine, Linear, Muon, orthogonalized
from moe.training.state import abstract_state
from tpu.collectives import Mesh, collective
from tpu.hlo import Module

MODEL = TransformerConfig(
    vocab_size=12,
    width=6,
    layers="DMM",
    attention=AttentionConfig(heads=2, kv_heads=1, head_width=4, qk_norm="full", bias=True),
    dense_width=5,
    moe=MoEConfig(num_experts=3, expert_width=4, shared_experts=1, shared_gate="sigmoid"),
)
FLAT = Linear(warmup=0, final=1.0)  # the peak learning rate at every step


SHAPES = cache(lambda: structure(MODEL)[1])


def values(seed):
    """A number for every entry of every parameter of the model."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), jnp.float32), SHAPES())


def named(params):
    return {"/".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.to_flat_state(params)}


def run(optimizer, params, gradients):
    """Parameters after one step for each of the gradients."""
    transformation = optimizer.build(params, steps=10)
    state = jax.jit(transformation.init)(params)
    update = jax.jit(transformation.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Cosine(warmup=10, final=0.1), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 60: 0.55, 110: 0.1, 200: 0.1}),
        (Cosine(warmup=10, final=0.1), {35: 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2}),
        (Linear(warmup=10, final=0.1), {0: 0.1, 9: 1, 10: 1, 60: 0.55, 85: 0.325, 110: 0.1}),
        (WSD(warmup=10, final=0.1, decay_fraction=0.2), {0: 0.1, 9: 1, 50: 1, 90: 1, 100: 0.55, 110: 0.1}),
        (WSD(warmup=10, final=0.0, decay_fraction=1.0), {10: 1, 60: 0.5, 110: 0}),
        (Cosine(warmup=0, final=0.0), {0: 1, 55: 0.5, 110: 0}),
        (Linear(warmup=1000, final=0.5), {0: 1 / 110, 109: 1}),  # longer than the run: all of it rises
    ],
    ids=str,
)
def test_schedules_at_their_corners(schedule, points):
    factor = schedule(110)
    for step, expected in points.items():
        assert float(factor(step)) == pytest.approx(expected, abs=1e-6), step


@given(st.sampled_from([Cosine, Linear, WSD]), st.integers(0, 30), st.integers(1, 100), st.floats(0, 1))
@settings(max_examples=20)
def test_a_factor_lies_between_0_and_1_and_never_rises_after_warm_up(family, warmup, steps, final):
    factor = family(warmup=warmup, final=final)(steps)
    factors = np.asarray(jax.vmap(factor)(np.arange(101)))[: steps + 1]  # one shape for all examples
    assert (factors > -1e-6).all()
    assert (factors < 1 + 1e-6).all()
    assert (np.diff(factors[: min(warmup, steps)]) > 0).all()
    assert (np.diff(factors[min(warmup, steps) :]) < 1e-6).all()


def test_the_rate_is_the_peak_times_the_factor():
    rate = AdamW(learning_rate=0.02, schedule=Linear(warmup=4, final=0.0)).rate(14)
    np.testing.assert_allclose([rate(s) for s in (0, 3, 4, 9, 14)], [0.005, 0.02, 0.02, 0.01, 0], atol=1e-7)


def test_a_first_moment_in_bfloat16_changes_updates_by_its_rounding_alone(one_device):
    optimizer = AdamW(learning_rate=0.1, schedule=FLAT, weight_decay=0.0, first_moment="bfloat16")
    params, gradients = values(seed=0), [values(seed) for seed in range(1, 5)]
    state = optimizer.build(params, steps=10).init(params)
    stored = {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))}
    assert stored == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "nu"))} == {jnp.dtype("float32")}

    exact = run(dataclasses.replace(optimizer, first_moment="float32"), params, gradients)
    rounded = run(optimizer, params, gradients)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (exact, params)), strict=True)]
    apart = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True)]
    assert all(0 < d < 0.01 * m for d, m in zip(apart, moved, strict=True))


@pytest.mark.parametrize("family", [AdamW, Muon])
def test_only_matrices_and_embeddings_decay(one_device, family):
    """Without gradients nothing moves but what decays, by learning rate times decay."""
    optimizer = family(learning_rate=0.1, schedule=FLAT, weight_decay=0.5)
    params = values(seed=0)
    after = named(run(optimizer, params, [jax.tree.map(jnp.zeros_like, params)]))
    for name, before in named(params).items():
        scale_or_bias = "norm" in name or "/b_" in name
        kept = 1.0 if scale_or_bias else 1 - 0.1 * 0.5
        np.testing.assert_allclose(after[name], kept * before, rtol=1e-6, err_msg=name)
    untouched = {name.rpartition("/")[2] for name in after if "norm" in name or "/b_" in name}
    assert untouched == {"scale", "b_q", "b_k", "b_v"}


def test_adamw_is_adam_with_decoupled_decay(one_device):
    """2 steps by hand (1711.05101, algorithm 2)."""
    optimizer = AdamW(learning_rate=0.1, schedule=FLAT, weight_decay=0.5, clip_norm=0.0, b1=0.8, b2=0.9)
    params, gradients = values(seed=0), [values(seed=1), values(seed=2)]
    after = named(run(optimizer, params, gradients))
    for name in ("embedding", "final_norm/scale", "stacks/1/blocks/0/moe/experts/w_up"):
        p = named(params)[name].astype(np.float64)
        first, second = 0.0, 0.0
        for t, grads in enumerate(gradients, start=1):
            g = named(grads)[name].astype(np.float64)
            first, second = 0.8 * first + 0.2 * g, 0.9 * second + 0.1 * g**2
            step = (first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.9**t)) + 1e-8)
            p = p - 0.1 * (step + (0 if "norm" in name else 0.5) * p)
        np.testing.assert_allclose(after[name], p, rtol=1e-4, atol=1e-5, err_msg=name)


def test_muon_treats_every_layers_and_experts_matrix_by_itself(one_device):
    optimizer = Muon(learning_rate=0.1, schedule=FLAT, weight_decay=0.0, clip_norm=0.0)
    params, gradients = values(seed=0), [values(seed=1), values(seed=2)]
    before, after = named(params), named(run(optimizer, params, gradients))
    gradients = [named(grads) for grads in gradients]
    alone = optax.contrib.muon(learning_rate=0.1, beta=0.0, nesterov=False, consistent_rms=0.2)
    adam = optax.adam(0.1, b1=0.9, b2=0.95, nesterov=True)

    @jax.jit(static_argnums=0)
    def both_steps(transformation, value, first, second):
        state = transformation.init(value)
        for grads in (first, second):
            updates, state = transformation.update(grads, state, value)
            value = value + updates
        return value

    def steps(transformation, value, name, index, seen):
        return both_steps(transformation, value, *(grads[name][index] for grads in seen))

    hidden = 0
    first, second = gradients
    momentum = [{n: 1.95 * g for n, g in first.items()}]  # Nesterov's, by hand
    momentum.append({n: g + 0.95 * (g + 0.95 * first[n]) for n, g in second.items()})
    for name, value in before.items():
        is_hidden = not any(
            part in name for part in ("norm", "b_", "router", "shared_gate", "embedding", "head")
        )
        if not is_hidden:
            expected = steps(adam, value, name, ..., gradients)
            np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
            continue
        hidden += 1
        for index in np.ndindex(value.shape[:-2]):
            expected = steps(alone, value[index], name, index, momentum)
            np.testing.assert_allclose(
                after[name][index], expected, rtol=1e-3, atol=1e-4, err_msg=f"{name}{index}"
            )
    assert hidden == 4 + 3 + 4 + 3 + 3  # attention and dense, then attention, experts and shared expert


@pytest.mark.parametrize("mesh", ["2x4"], indirect=True)
def test_muon_leaves_experts_on_their_devices(mesh):
    """Of experts no device sees more than its own, of all layers."""
    moe = dataclasses.replace(MODEL.moe, num_experts=16, expert_width=8)
    model = dataclasses.replace(MODEL, layers="MM", width=8, vocab_size=16, moe=moe)
    transformation = Muon().build(structure(model)[1], steps=10)
    state = abstract_state(model, transformation, average=False)

    def update(gradients, optimizer, params):
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (gradients, optimizer))
        return jax.sharding.auto_axes(transformation.update, out_sharding=shardings)(
            gradients, optimizer, params
        )

    program = jax.jit(update).lower(state.params, state.optimizer, state.params).compile()
    module, sizes = Module.parse(program.as_text()), Mesh(dict(jax.sharding.get_mesh().shape))
    found = [
        collective(module, where, instruction, sizes)
        for where in module.computations.values()
        for instruction in where.instructions.values()
    ]
    gathered = [each.payload for each in found if each and each.kind == "all-gather"]
    assert 0 < max(gathered) <= 2 * 16 * 8 * 8 * 4 // 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 3, 16, 48), (48, 16), (1, 32, 32)])
def test_singular_values_near_one_and_the_same_singular_vectors(dtype, shape):
    matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = np.asarray(orthogonalized(jnp.asarray(matrices, dtype)), np.float32)
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    in_their_basis = left.mT @ found @ right.mT
    diagonal = np.diagonal(in_their_basis, axis1=-2, axis2=-1)
    large = values > 0.1 * values.max()  # the iterations lift the smallest ones less
    assert np.all((diagonal > 0.6) & (diagonal < 1.3) | ~large)
    rest = in_their_basis - diagonal[..., None] * np.eye(diagonal.shape[-1])
    assert np.abs(rest).max() < (1e-3 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_muons_step_has_adamws_size(one_device, products):
    """2502.16982, eq. 4: a root mean square of about 0.2, for matrices of any shape."""
    params = values(seed=0)
    optimizer = Muon(learning_rate=1.0, schedule=FLAT, weight_decay=0.0, clip_norm=0.0, products=products)
    after = named(run(optimizer, params, [values(seed=1)]))
    for part in ("attention/w_q", "attention/w_k", "moe/experts/w_up", "moe/experts/w_down"):
        name = f"stacks/1/blocks/0/{part}"
        size = np.sqrt(np.mean((after[name] - named(params)[name]) ** 2))
        assert 0.1 < size < 0.3, (name, size)


@pytest.mark.parametrize(("clip_norm", "scale"), [(2.0, 2.0), (0.0, None), (1e9, None)])
def test_gradients_are_clipped_by_their_global_norm(one_device, clip_norm, scale):
    """Seen through an optimizer without momentum or scaling: its update is the clipped gradient."""

    class Plain(AdamW):
        def update_rule(self, params, rate):
            return optax.sgd(1.0)

    params, grads = values(seed=0), values(seed=1)
    after = run(Plain(clip_norm=clip_norm), params, [grads])
    moved = jax.tree.map(lambda a, b: a - b, params, after)
    expected = optax.tree.norm(grads) if scale is None else scale
    assert float(optax.tree.norm(moved)) == pytest.approx(float(expected), rel=1e-4)


def test_the_learning_rate_is_positive():
    with pytest.raises(UserError, match=r"optimizer\.learning_rate=0"):
        AdamW(learning_rate=0.0)
