"""Parameters and FLOPs against closed forms, XLA's own count and published figures."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe.analysis import compute
from moe.analysis.compute import Compute, account, by_component, data_sheet_peak, device_peak
from moe.config import load_config
from moe.dispatch import Capacity
from moe.experiment import Experiment
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, build
from moe.nn.free_experts import FreeExperts
from moe.nn.router import CosineRouter, LinearRouter, MLPRouter
from moe.routing import TopK

TINY = TransformerConfig(
    vocab_size=10,
    width=4,
    layers="DM",
    attention=AttentionConfig(heads=2, kv_heads=1, head_width=2),
    dense_width=6,
    moe=MoEConfig(
        num_experts=4,
        expert_width=5,
        routing=TopK(k=2),
        balance=(),
        shared_experts=2,
        shared_width=3,
        shared_gate="sigmoid",
    ),
)


def part(total: int, active: int, forward: int) -> Compute:
    return Compute(total, active, forward, 3 * forward)


def test_a_tiny_model_by_hand(one_device):
    projections = 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4)  # two layers: q, k, v, out
    scores = 2 * (2 * 2 * 2 * 2 * 4)  # two layers: 2 products, 2 FLOPs each, 2 heads of 2, over 8 / 2 keys
    assert by_component(TINY, 8) == {
        "embedding": part(40, 40, 0),
        "attention": part(projections, projections, 2 * projections + scores),
        "router": part(16, 16, 32),
        "experts": part(240, 120, 240),
        "shared experts": part(72 + 4, 72 + 4, 2 * (72 + 4)),
        "dense": part(72, 72, 144),
        "head": part(40, 40, 80),
        "norms": part(20, 20, 0),
    }
    assert account(TINY, 8) == part(600, 480, 968)


def test_a_tied_head_is_stored_once_and_multiplied_all_the_same(one_device):
    tied = by_component(replace(TINY, tied_embedding=True), 8)
    assert tied["embedding"] == part(40, 40, 80)
    assert "head" not in tied
    assert account(replace(TINY, tied_embedding=True), 8) == part(560, 440, 968)


def test_biases_and_norms_are_parameters_but_no_products(one_device):
    attention = replace(TINY.attention, bias=True, qk_norm="head")
    biased = account(replace(TINY, attention=attention), 8)
    assert biased == part(600 + 2 * (4 + 2 + 2) + 2 * (2 + 2), 480 + 2 * 8 + 2 * 4, 968)


def test_a_dense_model_uses_all_of_itself(one_device):
    parts = by_component(replace(TINY, layers="DD"), 8)
    assert not {"router", "experts", "shared experts"} & set(parts)
    assert all(p.total_params == p.active_params for p in parts.values())


def test_attention_grows_with_the_sequence_and_nothing_else_does(one_device):
    short, long = by_component(TINY, 8), by_component(TINY, 16)
    grown = {name for name in short if short[name] != long[name]}
    assert grown == {"attention"}
    assert long["attention"].forward_flops - short["attention"].forward_flops == 2 * (2 * 2 * 2 * 2 * 4)


def test_the_strategy_says_how_many_experts_a_token_uses(one_device, monkeypatch):
    monkeypatch.setattr(TopK, "experts_per_token", lambda self, num_experts: 1.5)
    assert by_component(TINY, 8)["experts"] == part(240, 90, 180)


def test_a_strategy_may_compute_more_experts_while_training(one_device, monkeypatch):
    monkeypatch.setattr(TopK, "trained_experts_per_token", lambda self, num_experts: num_experts)
    assert by_component(TINY, 8)["experts"] == Compute(240, 120, 240, 3 * 480)


def tiny(**fields) -> dict[str, Compute]:
    return by_component(replace(TINY, moe=replace(TINY.moe, **fields)), 8)


def test_free_experts_take_their_share_of_k_and_constant_ones_cost_their_vectors(one_device):
    parts = tiny(free_experts=FreeExperts(zero=1, copy=1, constant=2))
    assert parts["router"] == part(4 * 8, 4 * 8, 2 * 4 * 8)
    assert parts["experts"] == part(240, 60, 120)  # 2 of 8, of which 4 are real: one real expert a token
    assert parts["free experts"] == part(2 * (2 * 4 + 4), 24, 48)  # for each x -> 2 numbers, and a vector


def test_experts_of_several_widths_weigh_by_their_numbers(one_device):
    parts = tiny(expert_width=(5, 9, 9, 9))
    assert parts["experts"] == part(3 * 4 * 32, 3 * 4 * 16, 2 * 3 * 4 * 16)


def test_latent_experts_are_smaller_and_their_projections_serve_every_token(one_device):
    parts = tiny(latent_width=2)
    assert parts["latent projection"] == part(2 * 4 * 2, 16, 32)
    assert parts["experts"] == part(120, 60, 120)
    assert parts["router"] == part(16, 16, 32)


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (LinearRouter(trained=False), Compute(0, 0, 32, 64)),  # no gradient of the matrix, one of its input
        (MLPRouter(hidden=3), part(4 * 3 + 3 * 4, 24, 48)),
        (MLPRouter(), part(4 * 32 + 32 * 4, 256, 512)),
        (CosineRouter(dimensions=3), part(4 * 3 + 3 * 4 + 1, 25, 48)),  # the temperature is no product
        (CosineRouter(), part(4 * 2 + 2 * 4 + 1, 17, 32)),
    ],
    ids=str,
)
def test_routers_by_hand(one_device, router, expected):
    assert tiny(router=router)["router"] == expected


def test_softmax_coefficients_are_two_for_a_token(one_device):
    assert tiny(shared_gate="softmax")["shared experts"] == part(72 + 8, 72 + 8, 2 * (72 + 8))


def test_a_layer_that_some_tokens_enter_counts_by_their_fraction(one_device):
    all_enter = by_component(replace(TINY, layers="DM"), 8)
    some_enter = by_component(replace(TINY, layers="Dm", depth_capacity=0.2), 8)  # 2 of 8
    for name in ("router", "experts", "shared experts"):
        quarter = all_enter[name].forward_flops / 4
        assert some_enter[name] == part(all_enter[name].total_params, quarter / 2, quarter)
    assert some_enter["depth router"] == part(4, 4, 8)
    products = 2 * 48 + 2 * 48 / 4  # q, k, v, out of both layers
    scores = 2 * 2 * 2 * 2 * (8 * 8 / 2 + 2 * 2 / 2) / 8
    assert some_enter["attention"].forward_flops == products + scores


def test_a_parameter_nobody_listed_is_a_row_of_its_own(one_device, monkeypatch):
    monkeypatch.delitem(compute.COMPONENTS, "router")
    parts = by_component(TINY, 8)
    assert parts["w"] == part(16, 16, 32)
    assert account(TINY, 8) == part(600, 480, 968)


WIDE = TransformerConfig(
    vocab_size=512,
    width=128,
    layers="D",
    attention=AttentionConfig(heads=4, kv_heads=2, head_width=32),
    dense_width=256,
    moe=MoEConfig(num_experts=4, expert_width=64, routing=TopK(k=2), balance=(), dispatch=Capacity(1.0)),
    compute_dtype="float32",
)


def mixture(**fields) -> TransformerConfig:
    """One MoE layer."""
    return replace(WIDE, layers="M", moe=replace(WIDE.moe, **fields))


@pytest.mark.parametrize(
    "config",
    [
        WIDE,
        replace(WIDE, tied_embedding=True),
        mixture(),
        mixture(shared_experts=2, shared_gate="sigmoid"),
        mixture(router=MLPRouter(hidden=128), latent_width=64, shared_experts=1, shared_gate="softmax"),
        mixture(router=CosineRouter(dimensions=128), free_experts=FreeExperts(zero=1, copy=1, constant=2)),
        mixture(router=LinearRouter(trained=False), num_experts=64, expert_width=(128,) * 32 + (256,) * 32),
    ],
    ids=["dense", "tied", "moe", "shared", "latent", "free", "widths"],
)
def test_xla_counts_the_same(config, one_device):
    """One layer, for XLA counts the body of a loop once; a capacity of exactly the balanced load: no padding.

    XLA knows no causality: it is charged the whole square of attention. Elementwise work (norms, softmax,
    rotation, routing) is what it counts besides, 2 % at this width.
    """
    batch, sequence = 2, 128
    model = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jax.ShapeDtypeStruct((batch, sequence), jnp.int32)

    def logits(params, rest, tokens):
        model = nnx.merge(structure, params, rest)
        return model.logits(model(tokens)[0])

    def loss(params, rest, tokens):
        return jnp.sum(jnp.square(logits(params, rest, tokens)))

    def counted(function):
        compiled = jax.jit(function).lower(params, rest, tokens).compile()
        return compiled.cost_analysis()["flops"] / (batch * sequence)

    expected, attention = account(config, sequence), config.attention
    other_half = 2 * 2 * attention.heads * attention.head_width * sequence / 2
    forward, training = expected.forward_flops + other_half, expected.training_flops + 3 * other_half
    assert forward < counted(logits) < 1.03 * forward
    assert training < counted(jax.grad(loss)) < 1.03 * training


def test_the_published_flops_of_deepseekmoe_16b(one_device):
    """74.4T to train on 4K tokens, 2401.06066 table 3, which charges attention the whole square."""
    tokens = 4096
    parts = by_component(published_model("deepseek_v3_style_16b"), tokens)
    scores = 2 * 2 * 16 * 128 * tokens / 2 * 28
    whole_square = sum(p.training_flops for p in parts.values()) + 3 * scores
    assert tokens * whole_square == pytest.approx(74.4e12, rel=0.025)


def test_six_flops_a_parameter_and_token(one_device):
    """6 N (2001.08361) leaves out attention scores and charges the embedding, 1 % of Mixtral's active N."""
    mixtral = account(published_model("mixtral_8x7b"), 1)
    assert 0.98 < mixtral.training_flops / (6 * mixtral.active_params) < 1


def published_model(name: str) -> TransformerConfig:
    path = Path(__file__).parents[2] / "configs" / f"{name}.py"
    return load_config(str(path), Experiment)[0].model


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(kind, peak):
    assert data_sheet_peak(kind) == peak


def test_a_device_without_a_data_sheet_is_measured(monkeypatch):
    monkeypatch.setattr(compute, "measured_peak", lambda dtype: 7.0)
    assert device_peak(jnp.dtype("float32")) == 7.0
