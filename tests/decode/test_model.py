"""Prefill and decode steps, against the model that was trained, over whole sequences at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import VOCABULARY, built, config, full_logits

from moe.balance import LossFreeBias
from moe.decode import Decoder
from moe.decode.cache import LayerCache
from moe.decode.model import for_decoding
from moe.dispatch import Capacity, Dropless, OneHot
from moe.errors import UserError
from moe.mesh import spec
from moe.nn import AttentionConfig, CosineRouter, FreeExperts, LatentAttentionConfig, MLPRouter, structure
from moe.nn.quantized import quantize_params
from moe.quant import dequantize, format_named, quantize
from moe.routing import (
    ControlledTopP,
    DefaultMoE,
    Dense,
    DSelectK,
    DynMoE,
    Entmax,
    ExpertChoice,
    ExpertThreshold,
    GroupLimitedTopK,
    HashTokens,
    NoisyTopK,
    RandomExpert,
    ReLU,
    RoundRobin,
    Sinkhorn,
    SoftMoE,
    SparseMixer,
    TopK,
    TopP,
)

LENGTHS = np.array([5, 1, 12, 8, 3, 11, 2, 7])  # of prompts, padded to 12
STEPS, CACHE = 4, 20

# Every router and expert shape, every kind of attention, and the causal strategies; of those that are TopK in
# evaluation, one.
CONFIGS = {
    "top-k": config("DMDM", AttentionConfig(4, 1, 8, qk_norm="head"), routing=TopK(2)),
    "sigmoid": config(
        "DMM",
        AttentionConfig(4, 2, 8, qk_norm="full", bias=True),
        routing=TopK(2, scores="sigmoid", scale=2.5),
        balance=(LossFreeBias(0.01),),
        shared_experts=1,
        tokens_per_group=10,
    ),
    "latents": config(
        "DM",
        LatentAttentionConfig(4, query_rank=8, kv_rank=16, plain_width=6, rotary_width=4, value_width=5),
        routing=TopK(2),
    ),
    "group-limited": config(routing=GroupLimitedTopK(k=2), shared_experts=1, shared_gate="sigmoid"),
    "top-p": config(routing=TopP(), expert_width=4 * (4,) + 4 * (8,)),
    "controlled top-p": config(routing=ControlledTopP(), balance=(), latent_width=8),
    "cosine": config(
        routing=TopK(2), router=CosineRouter(), free_experts=FreeExperts(zero=1, copy=1, constant=2)
    ),
    "noisy": config(routing=NoisyTopK(2), router=MLPRouter(), shared_experts=1, shared_gate="softmax"),
    "relu": config(routing=ReLU(), balance=()),
    "default": config(routing=DefaultMoE(2)),
    "hash": config("DMM", routing=HashTokens(2), balance=()),
    "random": config("MM", routing=RandomExpert(2), balance=()),
    "threshold": config(routing=ExpertThreshold(), balance=()),
    **{
        type(routing).__name__: config("M", routing=routing, balance=())
        for routing in (*(Dense(), DSelectK(), DynMoE(), Entmax(), Sinkhorn(), SparseMixer()),)
    },
}


def prompts() -> np.ndarray:
    """Sequences of 8 prompts and what follows each."""
    return np.random.default_rng(7).integers(0, VOCABULARY, (len(LENGTHS), CACHE)).astype(np.int32)


def decoded(decoder, tokens, cache=jnp.float32) -> np.ndarray:
    """[B, 1 + STEPS, V]: logits behind each prompt, and behind each token that is then fed.

    Prompts are read into the slots of their device in reverse order, over what was there before.
    """
    per_device = len(tokens) // jax.sharding.get_mesh().size
    place = np.arange(len(tokens)) % per_device
    reverse = np.arange(len(tokens)) - 2 * place + per_device - 1  # the prompt in each slot, and back
    fed = np.stack([tokens[np.arange(len(tokens)), LENGTHS + i] for i in range(STEPS)])
    position = LENGTHS + np.arange(STEPS)[:, None]
    prompt = np.where(np.arange(12) < LENGTHS[:, None], tokens[:, :12], 0)

    @jax.jit
    def run(decoder, prompt, length, slot, fed, position):
        prompt, length, slot = jax.sharding.reshard((prompt, length, slot), spec("batch"))
        attention = decoder.config.attention
        empty = LayerCache.empty(attention, len(tokens), CACHE, jnp.dtype(cache))
        used = jax.tree.map(lambda c: c + jnp.ones_like(c), empty)
        logits, caches = decoder.prefill((used,) * len(decoder.layers), prompt, length, slot)

        def step(caches, xs):
            token, position = jax.sharding.reshard(xs, spec("batch"))
            logits, caches = decoder.step(caches, token, position, jnp.full_like(token, True, bool))
            return caches, logits

        return logits, jax.lax.scan(step, caches, (fed, position))[1]

    slot = per_device - 1 - place
    first, others = run(decoder, prompt, LENGTHS, slot, fed[:, reverse], position[:, reverse])
    return np.stack([np.asarray(first), *np.asarray(others)[:, reverse]], 1)


def expected(model, tokens) -> np.ndarray:
    logits = full_logits(model, tokens)
    places = LENGTHS[:, None] - 1 + np.arange(1 + STEPS)
    return np.take_along_axis(logits, places[..., None], 1)


@pytest.mark.parametrize(
    ("mesh", "format"), [("1x1", "int8"), ("1x1", "int4-8"), ("4x2", "int8")], indirect=["mesh"]
)
def test_quantised_weights_decode_to_the_logits_of_the_full_forward_pass(mesh, format):
    model, _ = built(CONFIGS["top-k"])
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rounded = quantize_params(params, format_named(format), jnp.dtype("float32"))
    tokens = prompts()
    found = decoded(Decoder.of(CONFIGS["top-k"], rounded, rest), tokens)
    np.testing.assert_allclose(found, expected(nnx.merge(graph, rounded, rest), tokens), rtol=1e-3, atol=1e-3)
    assert np.abs(found - expected(model, tokens)).max() > 0.01


def test_a_tied_head_is_rounded_as_one_of_its_own(one_device):
    tied = replace(CONFIGS["top-k"], tied_embedding=True)
    _, params, rest = nnx.split(built(tied)[0], nnx.Param, ...)
    rounded = quantize_params(params, format_named("int8"), jnp.dtype("float32"))
    leaves = dict(nnx.to_flat_state(rounded))
    table = leaves[("embedding",)]
    head = dequantize(quantize(table[...].T, format_named("int8")))
    leaves[("head",)] = table.replace(head, out_sharding=("embed", "vocab"))
    graph, _ = structure(replace(tied, tied_embedding=False))
    untied = nnx.merge(graph, nnx.from_flat_state(list(leaves.items())), rest)
    tokens = prompts()
    found = decoded(Decoder.of(tied, rounded, rest), tokens)
    np.testing.assert_allclose(found, expected(untied, tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_position_has_the_logits_of_the_full_forward_pass(name, one_device):
    model, decoder = built(CONFIGS[name])
    tokens = prompts()
    np.testing.assert_allclose(decoded(decoder, tokens), expected(model, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mesh", ["8x1", "2x4"], indirect=True)
def test_slots_split_over_a_mesh(mesh):
    model, decoder = built(CONFIGS["sigmoid"])
    tokens = prompts()
    np.testing.assert_allclose(decoded(decoder, tokens), expected(model, tokens), atol=1e-5, rtol=1e-5)


def test_a_sequence_alone_has_the_same_logits(one_device):
    model, decoder = built(CONFIGS["top-k"])
    tokens = prompts()
    together = decoded(decoder, tokens)
    for row, length in enumerate(LENGTHS[:3]):
        alone = full_logits(model, tokens[row : row + 1, : length + STEPS])[0, length - 1 :]
        np.testing.assert_allclose(together[row], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dispatch", [Capacity(1.0), OneHot(1.0)])
def test_what_a_capacity_dropped_in_training_is_computed(dispatch, one_device):
    trained = config("M", routing=TopK(2), dispatch=dispatch)
    _, decoder = built(trained)
    model, _ = built(replace(trained, moe=replace(trained.moe, dispatch=Dropless(tile=8))))
    tokens = prompts()
    np.testing.assert_allclose(decoded(decoder, tokens), expected(model, tokens), atol=1e-5, rtol=1e-5)


def test_an_int8_cache_moves_logits_little(one_device):
    model, decoder = built(CONFIGS["top-k"])
    tokens = prompts()
    exact = expected(model, tokens)
    error = np.abs(decoded(decoder, tokens, jnp.int8) - exact)
    np.testing.assert_allclose(error[:, 0], 0, atol=1e-5)  # prompts attend to what is not yet rounded
    assert 0 < error.max() < 0.05 * exact.std()


@pytest.mark.parametrize(
    ("refused", "named"),
    [
        (config(routing=ExpertChoice(), balance=()), "model.moe.routing=ExpertChoice"),
        (config(routing=SoftMoE(), balance=()), "model.moe.routing=SoftMoE"),
        (config(routing=RoundRobin(2), balance=()), "model.moe.routing=RoundRobin"),
        (config("Mm"), "model.layers='Mm'"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(refused, named):
    with pytest.raises(UserError, match="to generate") as error:
        for_decoding(refused)
    assert str(error.value).startswith(named)
    assert "\n" not in str(error.value)
