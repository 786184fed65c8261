"""Few tokens through their experts, against a loop over assignments in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.dispatch import Dropless
from moe.dispatch.touched import Touched
from moe.kernels.touched_mlp import ONE_BY_ONE, tile_for, touched_mlp
from moe.mesh import spec
from moe.nn.feed_forward import SWIGLU_EXPERTS
from moe.quant import Format, dequantize, quantize
from moe.routing import Routing

E, D, F, K = 16, 8, 12, 2
UNUSED = (0, 5, 15)


def weights(random) -> list[np.ndarray]:
    """Of every expert, but NaN for those that nobody goes to: whoever multiplies them shows it."""
    made = [0.5 * random.normal(size=shape).astype(np.float32) for shape in ((E, D, F), (E, D, F), (E, F, D))]
    for w in made:
        w[list(UNUSED)] = np.nan
    return made


def chosen(random, groups: int, tokens: int) -> np.ndarray:
    """[groups, tokens K]: experts; some assignments go nowhere."""
    used = [expert for expert in range(E) if expert not in UNUSED]
    return random.choice([*used, *used, E], size=(groups, tokens * K)).astype(np.int32)


def by_loop(x, w_gate, w_up, w_down, token, expert) -> np.ndarray:
    y = np.zeros((len(expert), D))
    for a, (t, e) in enumerate(zip(token, expert, strict=True)):
        if e < E:
            gate, up = (x[t].astype(np.float64) @ w[e] for w in (w_gate, w_up))
            y[a] = (gate / (1 + np.exp(-gate)) * up) @ w_down[e]
    return y


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, ONE_BY_ONE // K, 40])
def test_every_assignment_and_no_other_expert(tokens, quantised, one_device):
    random = np.random.default_rng(tokens)
    matrices, expert = weights(random), chosen(random, 1, tokens)
    given = matrices
    if quantised:
        given = [quantize(w, Format("int8")) for w in matrices]
        matrices = [np.asarray(dequantize(w)) for w in given]
    x = random.normal(size=(tokens, D)).astype(np.float32)
    token = np.repeat(np.arange(tokens), K)

    @jax.jit
    def run(x, expert, matrices):
        routing = Routing(jnp.asarray(token)[None], expert, jnp.ones(expert.shape), None, K)
        plan = Dropless(tile=tile_for(expert.size, E, x, *matrices)).plan(routing, tokens, 0, E, E)
        return touched_mlp(x, *matrices, expert.reshape(-1), plan)

    found = run(x, expert, given)
    np.testing.assert_allclose(found, by_loop(x, *matrices, token, expert[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", ["1x1", "4x2", "1x8"], indirect=True)
@pytest.mark.parametrize("per_token", [K, None])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_dispatch_sums_them_by_combine_weight(mesh, per_token, tokens):
    random, groups = np.random.default_rng(0), 8
    w_gate, w_up, w_down = matrices = weights(random)
    expert, weight = chosen(random, groups, tokens), random.random((groups, tokens * K)).astype(np.float32)
    x = random.normal(size=(groups, tokens, D)).astype(np.float32)
    token = np.tile(np.repeat(np.arange(tokens), K), (groups, 1)).astype(np.int32)

    @jax.jit
    def run(x, token, expert, weight, w_gate, w_up, w_down):
        x, token, expert, weight = jax.sharding.reshard((x, token, expert, weight), spec("batch"))
        split = jax.sharding.reshard({"w_gate": w_gate, "w_up": w_up, "w_down": w_down}, spec("expert"))
        routing = Routing(token, expert, weight, None, per_token)
        return Touched()(x, routing, split, SWIGLU_EXPERTS, num_experts=E, keep_outputs=True)

    arrays = run(x, token, expert, weight, w_gate, w_up, w_down)
    y, dropped, outputs = map(np.asarray, arrays)
    for group in range(groups):
        each = by_loop(x[group], *matrices, token[group], expert[group])
        np.testing.assert_allclose(outputs[group], each, rtol=1e-5, atol=1e-6)
        total = (weight[group][:, None] * each).reshape(tokens, K, D).sum(1)
        np.testing.assert_allclose(y[group], total, rtol=1e-5, atol=1e-6)
    assert not np.any(dropped)


def test_tiles_hold_what_an_expert_has_in_the_mean():
    assert [tile_for(assignments, 40, jnp.ones((1, D))) for assignments in (1, 80, 81, 512, 10_000)] == [
        2,
        2,
        4,
        16,
        64,
    ]
