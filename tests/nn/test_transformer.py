"""The whole transformer against layer by layer, token by token in float64; causality; order of layers."""

import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.balance import LossFreeBias, RoutingStatistics
from moe.dispatch import Dropless
from moe.errors import UserError
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, build, structure
from moe.nn.pattern import repeats
from moe.routing import SoftMoE, TopK

VOCABULARY, BATCH, SEQUENCE, EXPERTS = 20, 2, 5, 4

BASE = TransformerConfig(
    vocab_size=VOCABULARY,
    width=8,
    layers="DMM",
    attention=AttentionConfig(heads=2, kv_heads=1, head_width=4, qk_norm="head"),
    dense_width=6,
    moe=MoEConfig(
        num_experts=EXPERTS, expert_width=4, routing=TopK(k=2), balance=(), dispatch=Dropless(tile=4)
    ),
    norm_epsilon=1e-3,
    compute_dtype="float32",
)


def random_params(config, seed):
    """Graph, parameters as numpy arrays, and the same by name in float64."""
    graph, shapes = structure(config)
    random = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: random.normal(size=p.shape).astype(np.float32) / 2, shapes)
    named = {"/".join(map(str, path)): v[...].astype(np.float64) for path, v in nnx.to_flat_state(params)}
    return graph, params, named


def forward(graph):
    @jax.jit
    def apply(params, tokens):
        model = nnx.merge(graph, params)
        hidden, statistics = model(tokens)
        return model.logits(hidden), statistics

    return apply


def naive_block(config, kind, w, x, positions):
    """What a block makes of one sequence's tokens [T, D], and the load of its mixture, if it has one."""
    attention = config.attention
    rule = {"heads": attention.heads, "kv_heads": attention.kv_heads, "head_width": attention.head_width}
    rule |= {"qk_norm": attention.qk_norm, "theta": attention.rope_theta, "epsilon": config.norm_epsilon}
    norm = {"q_norm": w["attention/q_norm/scale"], "k_norm": w["attention/k_norm/scale"]}
    heads = {name: w[f"attention/{name}"] for name in ("w_q", "w_k", "w_v", "w_out")} | norm
    normed = naive.rms_norm(x, w["attention_norm/scale"], config.norm_epsilon)
    x = x + naive.attention(normed, heads, positions=positions, **rule)
    normed = naive.rms_norm(x, w["feed_forward_norm/scale"], config.norm_epsilon)
    if kind == "D":
        return x + naive.swiglu(normed, *(w[f"dense/{m}"] for m in ("w_gate", "w_up", "w_down"))), []
    k = config.moe.routing.k
    logits = normed @ w["moe/router/w"]
    chosen = naive.choose(logits, None, k, "softmax")
    weight = naive.combine_weights(logits, chosen, "softmax", True, 1.0).reshape(-1)
    token, expert = np.repeat(np.arange(len(x)), k), chosen.reshape(-1)
    matrices = {m: w[f"moe/experts/{m}"] for m in ("w_gate", "w_up", "w_down")}
    y, *_ = naive.experts(normed, token, expert, weight, expert >= 0, matrices, normed)
    return x + y, [np.bincount(expert, minlength=EXPERTS)]


def naive_transformer(config, p, tokens):
    """Logits [B, S, V] and the load of each MoE layer [L, B, E], one sequence after the other."""
    # Layers bottom first: where each one's parameters stand, and at which index of the stack.
    places = [
        (kind, f"stacks/{stack}/blocks/{block}", index)
        for stack, (unit, count) in enumerate(repeats(config.layers))
        for index in range(count)
        for block, kind in enumerate(unit)
    ]
    assert "".join(kind for kind, _, _ in places) == config.layers
    all_logits, loads = [], []
    for sequence in tokens:
        x, sequence_loads = p["embedding"][sequence], []
        for kind, place, index in places:
            w = {name.removeprefix(place + "/"): v[index] for name, v in p.items() if name.startswith(place)}
            taken, factor = list(range(len(x))), np.ones(len(x))
            if kind.islower():  # the best few by a router of their own, in the order of the sequence
                factor = x @ w["depth/w"][:, 0]
                best = sorted(taken, key=lambda s, r=factor: -r[s])
                taken = sorted(best[: max(1, round(config.depth_capacity * len(x)))])
            y, load = naive_block(config, kind.upper(), w, x[taken], taken)
            x = x.copy()
            x[taken] += factor[taken, None] * (y - x[taken])
            sequence_loads += load
        head = p["embedding"].T if config.tied_embedding else p["head"]
        all_logits.append(naive.rms_norm(x, p["final_norm/scale"], config.norm_epsilon) @ head)
        loads.append(sequence_loads)
    return np.array(all_logits), np.array(loads).swapaxes(0, 1)


@pytest.mark.parametrize(
    ("layers", "tied"),
    [("DMDM", False), ("DMM", True), ("MDDM", False), ("M", True), ("DD", False), ("DmmdM", False)],
)
def test_against_layer_by_layer(one_device, layers, tied):
    config = replace(BASE, layers=layers, tied_embedding=tied, depth_capacity=0.5)
    graph, params, named = random_params(config, seed=0)
    assert ("head" in named) != tied
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, SEQUENCE))
    logits, statistics = forward(graph)(params, tokens)
    expected_logits, expected_load = naive_transformer(config, named, tokens)
    np.testing.assert_allclose(logits, expected_logits, rtol=2e-4, atol=2e-4)
    if "M" in layers.upper():
        np.testing.assert_array_equal(statistics.load, expected_load)
    else:
        assert statistics is None


@cache
def compiled():
    """One compiled model for all examples."""
    graph, params, _ = random_params(BASE, seed=3)
    return forward(graph), params


@given(
    tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=SEQUENCE, max_size=SEQUENCE),
    position=st.integers(0, SEQUENCE - 1),
    shift=st.integers(1, VOCABULARY - 1),
)
@settings(max_examples=40)
def test_later_tokens_do_not_change_earlier_logits(one_device, tokens, position, shift):
    apply, params = compiled()
    changed = list(tokens)
    changed[position] = (changed[position] + shift) % VOCABULARY
    logits, _ = apply(params, np.array([tokens, changed]))
    np.testing.assert_allclose(logits[0, :position], logits[1, :position], rtol=1e-5, atol=1e-5)
    assert np.abs(logits[0, position:] - logits[1, position:]).max() > 1e-3


def gradients_of(config):
    """Compiled gradients of a sum of logits, and random parameters for it."""
    graph, params, _ = random_params(config, seed=4)

    def total(params, tokens):
        model = nnx.merge(graph, params)
        return jnp.sum(jnp.sin(model.logits(model(tokens)[0])))

    tokens = np.random.default_rng(5).integers(0, VOCABULARY, (BATCH, SEQUENCE))
    return jax.jit(jax.grad(total)).lower(params, tokens).compile(), (params, tokens)


def test_unrolled_layers_compute_what_the_loop_does_and_recompute_as_much(one_device):
    loop, arguments = gradients_of(BASE)
    unrolled, recomputing = (
        gradients_of(replace(BASE, unroll=True, remat=remat))[0] for remat in ("none", "full")
    )
    expected = loop(*arguments)
    for compiled in (unrolled, recomputing):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), compiled(*arguments), expected
        )
    products = [compiled.cost_analysis()["flops"] for compiled in (unrolled, recomputing)]
    assert 1.15 * products[0] < products[1] < 1.5 * products[0]


def test_a_tokens_embedding_sums_its_gradients_in_float32(one_device):
    graph, params, _ = random_params(replace(BASE, compute_dtype="bfloat16"), seed=6)
    tokens = np.zeros((BATCH, SEQUENCE), np.int32)
    program = jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graph, p)(tokens)[0].astype(jnp.float32).sum()))(
        params
    )
    sums = re.findall(rf"(\w+)\[{VOCABULARY},8\] = scatter-add", str(program))
    assert sums == ["f32"]


@pytest.mark.parametrize("layers", ["MDDM", "DMDM", "DMM", "mDM", "dmm"])
def test_each_layers_controller_gets_its_own_load(one_device, layers):
    config = replace(BASE, layers=layers, moe=replace(BASE.moe, balance=(LossFreeBias(rate=1.0),)))
    model = build(config, jax.random.key(0))
    load = np.ones((2, EXPERTS))
    load[0, 0], load[1, 3] = 9, 9
    rest = dict.fromkeys(("score", "z", "entropy", "confidence", "dropped", "tokens"), np.zeros(len(load)))
    model.update_controllers(RoutingStatistics(load=jnp.asarray(load), **rest))
    biases = [
        np.asarray(block.moe.controller_state["bias"][...])[index]
        for stack, (_, count) in zip(model.stacks, repeats(layers), strict=True)
        for index in range(count)
        for block in stack.blocks
        if hasattr(block, "moe")
    ]
    np.testing.assert_array_equal(biases, [[-1, 1, 1, 1], [1, 1, 1, -1]])


def test_structure_is_that_of_a_built_model(one_device):
    model = build(replace(BASE, layers="DMDM"), jax.random.key(0))
    graph, params = structure(replace(BASE, layers="DMDM"))
    built_graph, built = nnx.split(model)
    assert graph == built_graph
    shapes = [jax.tree.map(lambda p: (p.shape, p.dtype), tree) for tree in (params, built)]
    assert shapes[0] == shapes[1]


def test_fresh_layers_differ_from_each_other(one_device):
    """Stacked layers and experts draw from keys of their own."""
    model = build(BASE, jax.random.key(0))
    w_up = np.asarray(model.stacks[1].blocks[0].moe.experts.w_up[...])
    matrices = w_up.reshape(-1, w_up.shape[-2] * w_up.shape[-1])
    assert len(np.unique(matrices, axis=0)) == 2 * EXPERTS


@pytest.mark.parametrize("layers", ["", "DMX"])
def test_unknown_layers_are_refused(layers):
    with pytest.raises(UserError, match="layers="):
        replace(BASE, layers=layers)


@pytest.mark.parametrize("capacity", [0.0, 1.5])
def test_a_depth_capacity_is_a_fraction(capacity):
    with pytest.raises(UserError, match=f"depth_capacity={capacity}"):
        replace(BASE, depth_capacity=capacity)


def test_a_model_knows_what_looks_ahead():
    assert BASE.looks_ahead == []
    assert replace(BASE, layers="DmD").looks_ahead == ["model.layers='DmD'"]
    mixing = replace(BASE, moe=replace(BASE.moe, routing=SoftMoE()))
    assert mixing.looks_ahead == ["model.moe.routing=SoftMoE(slots_per_expert=1)"]
    assert replace(mixing, layers="DD").looks_ahead == []
