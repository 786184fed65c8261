"""Declarations of architectures: both ways, and what none of them carries."""

import importlib
import json
from dataclasses import replace

import pytest
from tiny import BODY, EXPERTS, HEADS, MODELS, WITHOUT

from moe.balance import LossFreeBias
from moe.errors import UserError
from moe.export.architecture import ABSENT, choose, essence
from moe.export.architectures import ARCHITECTURES
from moe.export.importing import architecture_of
from moe.nn import CosineRouter, FreeExperts
from moe.routing import ExpertChoice, TopK, TopP

BY_NAME = {architecture.model_type: architecture for architecture in ARCHITECTURES}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_its_config(name):
    chosen = choose(ARCHITECTURES, MODELS[name])
    assert chosen.model_type == name
    config = json.loads(json.dumps(chosen.config(MODELS[name])))
    assert ABSENT not in config
    assert essence(architecture_of(config, ARCHITECTURES).model(config)) == essence(MODELS[name])


@pytest.mark.parametrize("name", WITHOUT)
def test_parts_that_a_model_lacks_are_named_and_left_out_again(name):
    chosen = choose(ARCHITECTURES, WITHOUT[name])
    assert chosen.model_type == name
    config = chosen.config(WITHOUT[name])
    assert "shared_experts" in config[ABSENT]
    assert chosen.whole(config).moe.shared_experts
    assert essence(chosen.model(config)) == essence(WITHOUT[name])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("quickstart", "glm4_moe"),
        ("mixtral_8x7b", "mixtral"),
        ("olmoe_1b_7b", "olmoe"),
        ("qwen3_30b_a3b", "qwen3_moe"),
        ("deepseek_v3_style_16b", "glm4_moe"),
    ],
)
def test_published_shapes_find_their_architecture(config, name):
    model = importlib.import_module(f"configs.{config}").config.model
    assert choose(ARCHITECTURES, model).model_type == name


SIGMOID = replace(EXPERTS, routing=TopK(k=2, scores="sigmoid"), balance=())


@pytest.mark.parametrize(
    ("model", "feature"),
    [
        (replace(BODY, moe=replace(EXPERTS, latent_width=8)), "model.moe.latent_width=8"),
        (replace(BODY, moe=replace(EXPERTS, routing=TopP())), "model.moe.routing=TopP("),
        (replace(BODY, moe=replace(EXPERTS, routing=ExpertChoice())), "model.moe.routing=ExpertChoice("),
        (replace(BODY, moe=replace(EXPERTS, router=CosineRouter())), "model.moe.router=CosineRouter("),
        (replace(BODY, moe=replace(EXPERTS, balance=(LossFreeBias(),))), "model.moe.routing.scores=softmax"),
        (
            replace(BODY, moe=replace(EXPERTS, free_experts=FreeExperts(zero=1))),
            "model.moe.free_experts.zero=1",
        ),
        (
            replace(BODY, moe=replace(EXPERTS, expert_width=(16, 16, 16, 32))),
            "model.moe.expert_width=(16, 16, 16, 32)",
        ),
        (replace(BODY, moe=replace(EXPERTS, routing=TopK(k=2, scale=2.0))), "model.moe.routing.scale=2.0"),
        (replace(BODY, moe=replace(EXPERTS, shared_experts=1)), "model.moe.shared_gate=none"),
        (replace(BODY, layers="MmMM"), "model.layers=MmMM"),
        (replace(BODY, layers="MDMD", moe=SIGMOID), "model.layers=MDMD"),
        (
            replace(BODY, moe=SIGMOID, attention=replace(HEADS, qk_norm="full")),
            "model.attention.qk_norm=full",
        ),
    ],
)
def test_what_no_architecture_carries_is_named(model, feature):
    with pytest.raises(UserError) as refused:
        choose(ARCHITECTURES, model)
    assert feature in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ("qwen3_moe", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5, "rope_parameters": {}}, "partial_rotary_factor=0.5"),
        ("qwen3_moe", {"hidden_size": None}, "no hidden_size"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "k=9"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen2_moe", {"quantization_config": {}}, "quantised"),
        ("qwen2_moe", {"model_type": "gpt_oss"}, "model_type='gpt_oss'"),
    ],
)
def test_what_our_model_cannot_say_is_refused_by_name(name, change, message):
    config = BY_NAME[name].config(MODELS[name]) | change
    with pytest.raises(UserError, match=message) as refused:
        architecture_of(config, ARCHITECTURES).model(config)
    assert "\n" not in str(refused.value)


def test_older_configs_say_the_base_of_positions_at_the_top():
    config = BY_NAME["mixtral"].config(MODELS["mixtral"])
    del config["rope_parameters"], config["head_dim"]
    assert BY_NAME["mixtral"].model(config | {"rope_theta": 77.0}).attention.rope_theta == 77.0
    del config["rope_theta"]
    assert BY_NAME["mixtral"].model(config).attention.rope_theta == 1e6


def test_every_second_layer_dense_in_an_older_qwen_config():
    config = BY_NAME["qwen3_moe"].config(MODELS["qwen3_moe"])
    assert (
        BY_NAME["qwen3_moe"].model(config | {"mlp_only_layers": [], "decoder_sparse_step": 2}).layers
        == "DMDM"
    )
