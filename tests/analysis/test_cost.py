"""Predicted work against XLA's count, touched experts against a simulation, memory against a real state."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from moe.analysis.cost.matrices import Tokens, matrices, touched, weight_bytes
from moe.analysis.cost.memory import training_memory, weights_memory
from moe.analysis.cost.passes import SCORES, Work, decode, kv_bytes, prefill, total, train_step
from moe.analysis.cost.roofline import Workload, fewest_chips, timed
from moe.analysis.cost.touched import touched_by_load, touched_evenly
from moe.analysis.hardware import HARDWARE, Hardware
from moe.balance import LoadBalanceLoss
from moe.compress.size import weight_bytes as weight_bytes_by_kind
from moe.config import load_config
from moe.decode.cache import LayerCache
from moe.dispatch import Capacity
from moe.experiment import Experiment
from moe.nn import AttentionConfig, LatentAttentionConfig, MoEConfig, TransformerConfig, build, structure
from moe.nn.quantized import quantize_params
from moe.optim import AdamW
from moe.quant import format_named
from moe.routing import TopK
from moe.training.state import abstract_state
from moe.training.step import make_train_step

ROOT = Path(__file__).parents[2]

MODEL = TransformerConfig(
    vocab_size=1024,
    width=512,
    layers="DM",
    attention=AttentionConfig(heads=8, kv_heads=4, head_width=64),
    dense_width=1024,
    moe=MoEConfig(
        num_experts=4,
        expert_width=512,
        routing=TopK(k=2),
        balance=(),
        dispatch=Capacity(1.0),
        shared_experts=1,
    ),
    compute_dtype="float32",
    unroll=True,
)


def square(config: TransformerConfig, length: int) -> float:
    """FLOPs a token of the half of attention's square that causality spares, which XLA does all the same."""
    return 2 * config.attention.heads * config.attention.head_width * length * len(config.layers)


def test_xla_counts_the_same_in_the_whole_train_step(one_device):
    """Within 2 %: what XLA counts besides are norms, softmax, routing, the optimizer and the metrics.

    Layers are unrolled, for XLA counts the body of a loop once.
    """
    batch, length = 8, 128
    graph, shapes = structure(MODEL)
    transformation = AdamW().build(shapes, 10)
    state = abstract_state(MODEL, transformation, average=False)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    slices = jax.ShapeDtypeStruct((batch,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = make_train_step(graph, transformation).lower(state, key, tokens, slices, 1)
    counted = lowered.compile().cost_analysis()["flops"]
    expected = total(train_step(MODEL, batch, length)).flops + 3 * batch * length * square(MODEL, length)
    assert expected < counted < 1.02 * expected


def test_a_balance_loss_over_an_accumulated_batch_costs_a_third_of_the_layers_more(one_device):
    def cost(group: int, accumulation: int) -> dict:
        balance = (LoadBalanceLoss(0.01, sequences_per_group=group),)
        model = replace(MODEL, moe=replace(MODEL.moe, balance=balance))
        return train_step(model, 8, 128, accumulation=accumulation)

    parts = cost(0, 2)
    layers = [
        work for name, work in parts.items() if name not in ("embedding", "head", "optimizer", "counting")
    ]
    assert parts["counting"].flops == pytest.approx(sum(work.flops for work in layers) / 3)
    assert "counting" not in cost(0, 1)
    assert "counting" not in cost(1, 2)


def test_xla_counts_the_same_in_decoding_and_in_reading_a_prompt(one_device):
    """Products by the model on one token a sequence, attention by itself, over a cache."""
    batch, context, attention = 64, 256, MODEL.attention
    model = jax.eval_shape(lambda: build(replace(MODEL, moe=grouped(batch)), jax.random.key(0)))
    graph, state = nnx.split(model)

    def one_token(state, tokens):
        model = nnx.merge(graph, state)
        return model.logits(model(tokens)[0])

    def attend(q, k, v):
        scores = jnp.einsum("bghd,bngd->bghn", q, k)
        return jnp.einsum("bghn,bngd->bghd", scores, v)

    def counted(function, *shapes):
        return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]

    def cache(*shape):
        return jax.ShapeDtypeStruct((batch, *shape, attention.head_width), jnp.float32)

    groups = attention.kv_heads
    q, kv = cache(groups, attention.heads // groups), cache(context, groups)
    products = counted(one_token, state, jax.ShapeDtypeStruct((batch, 1), jnp.int32))
    one_position = batch * 2 * square(MODEL, 1)  # attention to itself, which `attend` has too
    measured = products - one_position + len(MODEL.layers) * counted(attend, q, kv, kv)
    expected = total(decode(MODEL, batch, context)).flops
    assert expected < measured < 1.02 * expected

    # A prompt is as many tokens as decoded one by one, but for the logits of all but the last.
    one_by_one = sum(total(decode(MODEL, 1, n)).flops for n in range(1, context + 1))
    logits = (context - 1) * 2 * MODEL.width * MODEL.vocab_size
    diagonal = square(MODEL, 1) * context  # half of each token's attention to itself
    read = total(prefill(MODEL, 1, context)).flops
    assert read == pytest.approx(one_by_one - logits - diagonal, rel=1e-12)


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(heads=8, kv_heads=2, head_width=32),
        LatentAttentionConfig(heads=4, kv_rank=64, plain_width=32, rotary_width=16, value_width=32),
    ],
)
def test_the_cache_is_as_large_as_that_of_generation(one_device, attention, cache):
    config = replace(MODEL, attention=attention)
    made = jax.eval_shape(lambda: LayerCache.empty(attention, 3, 20, jnp.dtype(cache)))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    assert len(config.layers) * held == 3 * kv_bytes(config, 20, cache)


def test_one_more_token_of_context_costs_what_xla_counts_over_latent_attention(one_device):
    """Keys and values of all heads, values padded to the width of keys."""
    latent = LatentAttentionConfig(heads=8, kv_rank=64, plain_width=32, rotary_width=16, value_width=32)
    config, batch, context = replace(MODEL, attention=latent), 4, 256

    def attend(q, k, v):
        return jnp.einsum("bhn,bnhc->bhc", jnp.einsum("bhc,bnhc->bhn", q, k), v)

    q = jax.ShapeDtypeStruct((batch, latent.heads, 48), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((batch, context, latent.heads, 48), jnp.bfloat16)
    counted = jax.jit(attend).lower(q, kv, kv).cost_analysis()["flops"]
    more, less = (total(decode(config, batch, length)) for length in (2 * context, context))
    assert more.flops - less.flops == len(config.layers) * counted
    assert more.bytes - less.bytes == len(config.layers) * batch * context * 2 * 8 * 48 * 2


def grouped(tokens: int) -> MoEConfig:
    return replace(MODEL.moe, tokens_per_group=tokens)


@given(
    experts=st.integers(1, 40), k=st.integers(1, 40), tokens=st.integers(0, 60), seed=st.integers(0, 2**31)
)
def test_touched_experts_are_those_of_a_simulation(experts, k, tokens, seed):
    """Monte Carlo: each token takes K distinct experts, evenly; the mean over draws, to five errors."""
    k, draws, random = min(k, experts), 400, np.random.default_rng(seed)
    chosen = random.random((draws, max(tokens, 1), experts)).argsort(-1)[..., :k]
    hit = np.zeros((draws, experts), bool)
    hit[np.arange(draws)[:, None], chosen.reshape(draws, -1)] = tokens > 0
    visited = hit.sum(1)
    error = 5 * visited.std() / math.sqrt(draws) + 5 / draws
    assert abs(visited.mean() - touched_evenly(experts, k, tokens)) <= error


def test_touched_experts_under_uneven_load_are_those_of_a_simulation():
    random, experts, k, tokens, draws = np.random.default_rng(0), 16, 4, 6, 20_000
    # Gumbel top-k: K distinct experts, the likely ones more often. Its shares are measured, as in a run.
    logits = np.linspace(-2, 2, experts)
    chosen = (logits + random.gumbel(size=(draws, tokens, experts))).argsort(-1)[..., -k:]
    share = np.bincount(chosen.ravel(), minlength=experts) / (draws * tokens)
    visited = [len(np.unique(batch)) for batch in chosen]
    assert share.sum() == pytest.approx(k)
    assert touched_by_load(share, tokens) == pytest.approx(np.mean(visited), rel=0.01)
    assert touched_by_load(share, tokens) < touched_evenly(experts, k, tokens) - 0.5


@given(st.integers(1, 64), st.integers(0, 1000))
def test_even_load_is_even(experts, tokens):
    k = max(1, experts // 4)
    even = touched_by_load(np.full(experts, k / experts), tokens)
    assert even == pytest.approx(touched_evenly(experts, k, tokens))


def test_touched_bytes_of_mixed_widths_and_measured_load(one_device):
    """Bytes of experts by hand: a narrow one that all tokens visit, wide ones that none does."""
    moe = replace(MODEL.moe, expert_width=(64, 512, 512, 512), routing=TopK(k=1), shared_width=8)
    model = replace(MODEL, moe=moe)
    tokens = Tokens(5, 32, load=np.array([[4.0, 0.0, 0.0, 0.0]]))
    routed = [m for m in matrices(model) if m.experts]
    assert {m.experts for m in routed} == {range(1), range(1, 4)}
    assert sum(weight_bytes(model, m, tokens, "bf16") for m in routed) == 3 * 512 * 64 * 2
    even = [sum(touched(model, m, Tokens(5, 32))) for m in routed if m.inputs == 512 and m.outputs != 512]
    assert even == pytest.approx(2 * [touched_evenly(4, 1, 5) / 4])


def test_decoding_reads_all_weights_at_most_and_the_whole_cache(one_device):
    work = decode(MODEL, 4096, 100)
    weights = sum(weight_bytes(MODEL, m, Tokens(4096, 100), "bf16") for m in matrices(MODEL))
    assert weights == pytest.approx(weights_memory(MODEL, "bf16"), rel=1e-9)
    one_more = decode(MODEL, 4096, 101)[SCORES].bytes - work[SCORES].bytes
    assert one_more == 4096 * (2 * 4 * 64) * 2 * 2  # keys and values, two layers, two bytes
    assert kv_bytes(MODEL, 1) == (2 * 4 * 64) * 2 * 2


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4", "int4-128", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_as_large_as_the_quantised_model(one_device, weights, tied):
    """Bytes of the parameters that `quantize_params` makes, or of those that plain decoding reads."""
    model = replace(MODEL, tied_embedding=tied, compute_dtype="bfloat16")
    _, params = structure(model)
    if weights != "bf16":
        format = format_named(weights)
        params = jax.eval_shape(lambda p: quantize_params(p, format, model.dtype), params)
    assert weights_memory(model, weights) == sum(weight_bytes_by_kind(params, model.dtype).values())


def test_the_state_of_training_is_as_large_as_the_real_one(one_device):
    optimizer = AdamW()
    state = abstract_state(MODEL, optimizer.build(structure(MODEL)[1], 10), average=True)
    held = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state.params, state.optimizer, state.average))
    )
    assert training_memory(MODEL, optimizer, tokens=64, length=64, average=True).state == held


def test_the_memory_of_training_is_what_an_h100_held(one_device):
    kept = json.loads((ROOT / "benchmarks" / "results" / "train_step_h100.json").read_text())
    experiment = load_config(str(ROOT / kept["config"]), Experiment)[0]
    shape = kept["shape"]
    assert repr(experiment.optimizer) == shape["optimizer"]
    memory = training_memory(
        experiment.model,
        experiment.optimizer,
        tokens=shape["sequences"] * shape["sequence_length"],
        length=shape["sequence_length"],
        loss_chunks=shape["loss_chunks"],
    )
    assert memory.total == pytest.approx(kept["peak_bytes"], rel=0.05)


def test_time_is_the_sum_of_what_binds_each_part():
    chip = Hardware("x", "x", peak_flops=100.0, bandwidth=10.0, memory=64.0)
    work = Workload("w", 4, {"arithmetic": Work(1000, 10), "memory": Work(10, 50)}, memory=129.0)
    found = timed(work, chip, dollars_per_hour=36.0)
    assert (found.chips, found.bound) == (4, "compute")
    assert found.seconds_by_part == {"arithmetic": 2.5, "memory": 1.25}
    assert found.tokens_per_second_per_chip == pytest.approx(4 / 3.75 / 4)
    assert found.dollars_per_million_tokens == pytest.approx(36 / 3600 * 4 * 3.75 / 4 * 1e6)
    assert timed(work, chip, chips=1).seconds == 15.0
    assert timed(work, chip).dollars_per_million_tokens is None


def test_chips_are_as_many_as_hold_it():
    assert fewest_chips(1.0, HARDWARE["v5e"]) == 1
    assert fewest_chips(16 * 2**30, HARDWARE["v5e"]) == 1
    assert fewest_chips(16 * 2**30 + 1, HARDWARE["v5e"]) == 2
