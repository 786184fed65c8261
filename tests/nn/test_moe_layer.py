"""The whole MoE layer against a loop over tokens in float64: output, every gradient, on every mesh."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.balance import LossFreeBias
from moe.dispatch import Capacity, Dropless
from moe.errors import UserError
from moe.mesh import logical_rules, spec
from moe.nn import MoEConfig, MoELayer
from moe.routing import Context, Routing, Strategy, TopK

WIDTH, SEQUENCE, BATCH, EXPERTS = 8, 6, 16, 8

CONFIGS = {
    "mixtral": MoEConfig(EXPERTS, 5, TopK(k=2), (), Dropless(tile=4)),
    "switch": MoEConfig(
        EXPERTS, 5, TopK(k=1, renormalize=False), (), Capacity(1.0, "position"), tokens_per_group=3
    ),
    "deepseek": MoEConfig(
        EXPERTS,
        5,
        TopK(k=3, scores="sigmoid", scale=2.5),
        (LossFreeBias(),),
        Dropless(tile=16),
        shared_experts=2,
        shared_width=3,
    ),
    "v-moe": MoEConfig(
        EXPERTS,
        5,
        TopK(k=2, renormalize=False),
        (LossFreeBias(),),
        Capacity(0.5, "score"),
        shared_experts=1,
        shared_gate="sigmoid",
        tokens_per_group=2 * SEQUENCE,
    ),
}


@jax.jit(static_argnames="config")
def run(config, params, bias, x, y_bar):
    """Output, statistics and the gradients of x and of every parameter, from plain arrays."""
    graph, abstract_params, abstract_rest = abstract_layer(config)
    layout = partial(jax.tree.map, lambda like, value: jax.sharding.reshard(value, like.sharding.spec))
    rest = jax.tree.map(lambda _: jnp.asarray(bias), abstract_rest)

    def forward(params, x):
        layer = nnx.merge(graph, layout(abstract_params, params), rest)
        shape = x.shape[:2]
        token_id, mask = (
            jax.sharding.reshard(a, spec("batch"))
            for a in (jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
        )
        return layer(jax.sharding.reshard(x, spec("batch")), token_id, mask)

    y, pullback, statistics = jax.vjp(forward, params, x, has_aux=True)
    return y, statistics, *pullback(jax.sharding.reshard(y_bar, spec("batch")))


def abstract_layer(config):
    def build():
        return MoELayer(config, WIDTH, out_std=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    with logical_rules():
        return nnx.split(jax.eval_shape(jax.jit(build)), nnx.Param, ...)


def naive_layer(config: MoEConfig, p, bias, x, y_bar):
    """y, load, gradients by name and x_bar; `p` holds the parameters by name."""
    rule = (config.routing.scores, config.routing.renormalize, config.routing.scale)
    k, experts = config.routing.k, config.num_experts
    flat, flat_y_bar = x.reshape(-1, WIDTH), y_bar.reshape(-1, WIDTH)
    y, x_bar = np.zeros_like(flat), np.zeros_like(flat)
    grads = {name: np.zeros_like(value) for name, value in p.items()}
    load = np.zeros(experts)
    weights = {name: p[f"experts/{name}"] for name in ("w_gate", "w_up", "w_down")}
    tokens_per_group = config.tokens_per_group or x.shape[1]
    for first in range(0, len(flat), tokens_per_group):
        group = slice(first, first + tokens_per_group)
        logits = flat[group] @ p["router/w"]
        chosen = naive.choose(logits, bias, k, config.routing.scores)
        combine_weight = naive.combine_weights(logits, chosen, *rule).reshape(-1)
        expert, token = chosen.reshape(-1), np.repeat(np.arange(tokens_per_group), k)
        kept = np.ones(len(expert), bool)
        if isinstance(config.dispatch, Capacity):
            capacity = (config.dispatch.capacity_factor, config.dispatch.priority)
            kept = naive.kept(expert, combine_weight, k, experts, *capacity)
        load += np.bincount(expert, minlength=experts)
        y[group], x_bar[group], weight_bar, weights_bar = naive.experts(
            flat[group], token, expert, combine_weight, kept, weights, flat_y_bar[group]
        )
        for name, value in weights_bar.items():
            grads[f"experts/{name}"] += value
        logits_bar = naive.logits_gradient(logits, chosen, weight_bar.reshape(-1, k), *rule)
        grads["router/w"] += flat[group].T @ logits_bar
        x_bar[group] += logits_bar @ p["router/w"].T
    if config.shared_experts:
        shared = {name: p[f"shared/{name}"][None] for name in ("w_gate", "w_up", "w_down")}
        token = np.arange(len(flat))
        gate, gate_slope = np.ones(len(flat)), np.zeros(len(flat))
        if config.shared_gate == "sigmoid":
            gate = naive.sigmoid(flat @ p["shared/w_shared_gate"])[:, 0]
            gate_slope = gate * (1 - gate)
        out, shared_x_bar, gate_bar, shared_bar = naive.experts(
            flat, token, 0 * token, gate, token >= 0, shared, flat_y_bar
        )
        y, x_bar = y + out, x_bar + shared_x_bar
        for name, value in shared_bar.items():
            grads[f"shared/{name}"] = value[0]
        if config.shared_gate == "sigmoid":
            grads["shared/w_shared_gate"] = flat.T @ (gate_bar * gate_slope)[:, None]
            x_bar += np.outer(gate_bar * gate_slope, p["shared/w_shared_gate"][:, 0])
    return y.reshape(x.shape), load, grads, x_bar.reshape(x.shape)


def assert_close(actual, expected, what):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5 * scale, err_msg=what)


def check(config, seed, crowd):
    """Compare for random values; `crowd` pulls every token towards expert 5."""
    random = np.random.default_rng(seed)
    _, abstract_params, _ = abstract_layer(config)
    named = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(abstract_params)}
    p = {name: random.normal(size=v.shape).astype(np.float32) for name, v in named.items()}
    x = random.normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32)
    x[..., 0] = 1.0
    p["router/w"] *= 0.3  # far from float32 scores that are all 1.0, whose order is anyone's
    p["router/w"][0, 5] += crowd
    y_bar = random.normal(size=x.shape).astype(np.float32)
    bias = random.normal(size=EXPERTS).astype(np.float32) if config.controller else None

    params = jax.tree.unflatten(jax.tree.structure(abstract_params), list(p.values()))
    y, statistics, params_bar, x_bar = run(config, params, bias, x, y_bar)
    wide = {name: value.astype(np.float64) for name, value in p.items()}
    expected = naive_layer(config, wide, bias, x.astype(np.float64), y_bar.astype(np.float64))
    assert_close(y, expected[0], "output")
    np.testing.assert_array_equal(statistics.load.sum(0), expected[1])
    for (name, gradient), value in zip(expected[2].items(), jax.tree.leaves(params_bar), strict=True):
        assert_close(value, gradient, f"gradient of {name}")
    assert_close(x_bar, expected[3], "gradient of x")
    return statistics


ON_MESHES = [
    ("mixtral", "1x1"),
    ("mixtral", "8x1"),
    ("mixtral", "1x8"),
    ("switch", "1x1"),
    ("switch", "2x4"),
    ("deepseek", "1x1"),
    ("deepseek", "4x2"),
    ("v-moe", "1x1"),
    ("v-moe", "2x4"),
]


@pytest.mark.parametrize(("name", "mesh"), ON_MESHES, indirect=["mesh"])
@given(seed=st.integers(0, 2**16), crowd=st.sampled_from([0.0, 2.0, 4.0]))
@settings(max_examples=8)
def test_output_and_every_gradient(mesh, name, seed, crowd):
    check(CONFIGS[name], seed, crowd)


@pytest.mark.parametrize("mesh", ["1x1"], indirect=True)
def test_a_crowded_expert_takes_everything_and_drops_what_does_not_fit(mesh):
    dropless = check(CONFIGS["mixtral"], seed=0, crowd=30.0)
    assert dropless.load[:, 5].sum() == BATCH * SEQUENCE
    assert dropless.dropped.sum() == 0
    capacity = check(CONFIGS["switch"], seed=0, crowd=30.0)
    assert capacity.load[:, 5].sum() == BATCH * SEQUENCE
    assert capacity.dropped.sum() == BATCH * (SEQUENCE - 2)  # one token of each group of three finds room


@dataclass(frozen=True)
class Witness(Strategy):
    """Reports what its context held, in place of expert 0's score."""

    sees: str = "token_id"

    def __call__(self, logits, bias, context: Context) -> Routing:
        routing = TopK(k=1)(logits, bias, context)
        match self.sees:
            case "token_id":
                seen = context.token_id
            case "mask":
                seen = context.mask
            case "key":
                seen = jax.random.uniform(context.key, len(logits))
        return replace(routing, scores=jnp.zeros_like(logits).at[:, 0].set(seen.astype(jnp.float32)))


def witness(sees, keys=None, layer_number=0, tokens_per_group=3):
    """What a strategy saw, summed over each sequence; the last sequence is padding but for one token."""
    config = MoEConfig(EXPERTS, 5, Witness(sees), (), tokens_per_group=tokens_per_group)
    graph, params, rest = abstract_layer(config)

    @jax.jit
    def apply(token_id, mask, keys):
        values = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype, out_sharding=p.sharding.spec), params)
        x = jnp.zeros((BATCH, SEQUENCE, WIDTH), out_sharding=spec("batch"))
        layer = nnx.merge(graph, values, rest)
        laid_out = jax.sharding.reshard((token_id, mask), spec("batch"))
        return layer(x, *laid_out, keys, layer_number)[1]

    token_id = np.arange(BATCH * SEQUENCE, dtype=np.int32).reshape(BATCH, SEQUENCE)
    mask = np.ones((BATCH, SEQUENCE), bool)
    mask[-1, 1:] = False
    return apply(token_id, mask, keys).score[:, 0], token_id, mask


@pytest.mark.parametrize("mesh", ["1x1", "4x2"], indirect=True)
def test_a_strategy_sees_its_tokens_and_their_mask(mesh):
    seen, token_id, mask = witness("token_id")
    np.testing.assert_array_equal(seen, (token_id * mask).sum(1))
    seen, _, mask = witness("mask")
    np.testing.assert_array_equal(seen, mask.sum(1))


@pytest.mark.parametrize("mesh", ["1x1", "4x2"], indirect=True)
@pytest.mark.parametrize("tokens", [SEQUENCE // 2, SEQUENCE, 2 * SEQUENCE])
def test_randomness_is_of_the_sequence_the_layer_and_the_place_in_the_sequence(mesh, tokens):
    """And of nothing else: a group that spans sequences takes the first one's."""
    keys = jax.random.split(jax.random.key(0), BATCH)
    seen, _, mask = witness("key", keys, layer_number=3, tokens_per_group=tokens)
    drawn = np.zeros(BATCH * SEQUENCE)
    for first in range(0, BATCH * SEQUENCE, tokens):
        row, place = divmod(first, SEQUENCE)
        of_layer = jax.random.fold_in(keys[row], 3)
        of_group = jax.random.fold_in(of_layer, place // tokens)
        drawn[first : first + tokens] = jax.random.uniform(of_group, tokens)
    np.testing.assert_allclose(seen, (drawn.reshape(mask.shape) * mask).sum(1), rtol=1e-5)


@pytest.mark.parametrize("mesh", ["1x1"], indirect=True)
@pytest.mark.parametrize("tokens", [4, 18, 192])
def test_groups_and_sequences_must_fit(mesh, tokens):
    """Neither divisor nor multiple of 6 tokens; a multiple that does not divide the batch; too many."""
    with pytest.raises(UserError, match=f"tokens_per_group={tokens} must"):
        check(replace(CONFIGS["mixtral"], tokens_per_group=tokens), seed=0, crowd=0.0)


def test_bad_layers_are_refused():
    with pytest.raises(UserError, match="num_experts=0"):
        MoEConfig(num_experts=0)
    with pytest.raises(UserError, match=r"k=3 .*num_experts=2"):
        MoEConfig(num_experts=2, routing=TopK(k=3))
    with pytest.raises(UserError, match="2 controllers"):
        MoEConfig(balance=(LossFreeBias(), LossFreeBias()))
