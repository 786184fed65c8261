"""ONNX models: what stands in them, what is refused, and what ONNX Runtime answers where it is installed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny import MODELS, RandomWeights

from moe.dispatch import Capacity
from moe.errors import UserError
from moe.export.hugging_face import Text
from moe.export.onnx_folder import check, write_onnx
from moe.export.verify import client_answer, compare, our_answer
from moe.nn import AttentionConfig, FreeExperts, TransformerConfig
from moe.quant import dequantize, format_named, quantize
from moe.routing import ExpertChoice, TopK

PYTHON = Path(__file__).parents[2] / ".peers" / "onnxruntime" / "bin" / "python"


def fitting(name: str, **changes) -> TransformerConfig:
    """A tiny model with heads of 32, of which 16 dimensions at least are rotated."""
    model = MODELS[name]
    assert isinstance(model.attention, AttentionConfig)
    return replace(model, attention=replace(model.attention, head_width=32), **changes)


MIXTRAL = MODELS["mixtral"].moe
FITTING = {
    "norms on heads, dense layers between": fitting("qwen3_moe"),
    "sigmoid, groups, bias, half rotated": fitting("glm4_moe"),
    "a norm over all heads": fitting("olmoe"),
    "a gated shared expert": fitting("qwen2_moe"),
    "two gates": fitting("mixtral", moe=replace(MIXTRAL, shared_experts=1, shared_gate="softmax")),
    "roots of softplus": fitting(
        "mixtral",
        moe=replace(MIXTRAL, routing=TopK(k=3, scores="sqrt_softplus", renormalize=False, scale=0.7)),
    ),
    "dense, tied": fitting("llama"),
    "nothing rotated": replace(
        MODELS["mixtral"], attention=AttentionConfig(heads=2, head_width=16, rotary_fraction=0.0, kv_heads=1)
    ),
}


@pytest.fixture(autouse=True)
def _mesh(one_device):
    pass


def written(folder: Path, model: TransformerConfig, text: Text, format: str = "") -> RandomWeights:
    weights = RandomWeights(model)
    write_onnx(
        folder, model, weights.read, text, name="tiny", format=format_named(format) if format else None
    )
    return weights


@pytest.mark.parametrize("name", FITTING)
def test_onnx_runtime_says_what_our_model_says(tmp_path, text, name):
    if not PYTHON.exists():
        pytest.skip("ONNX Runtime is not installed: python -m benchmarks.peers.environment onnxruntime")
    model = FITTING[name]
    weights = written(tmp_path, model, text)
    prompts = np.random.default_rng(0).integers(0, 250, (2, 16))
    ours = our_answer(model, weights.read, prompts, 4)
    for client in ("run_onnxruntime", "run_onnxruntime_genai"):
        found = compare(prompts, ours, client_answer(client, PYTHON, tmp_path, prompts, 4))
        assert found.exact, (client, found)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantised_weights_are_those_of_our_formats(tmp_path, text, format):
    model = fitting("glm4_moe", moe=replace(MODELS["glm4_moe"].moe, expert_width=32), dense_width=64)
    weights = written(tmp_path, model, text, format)
    graph = onnx.load(tmp_path / "model.onnx").graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ours = format_named(format)

    def stored(name: str) -> np.ndarray:
        """What ONNX Runtime's documentation says that codes and scales stand for, [..., out, in]."""
        codes, scales = arrays[f"{name}.codes"], arrays[f"{name}.scales"]
        if format == "int4":
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        values = codes.astype(np.float32) - 2 ** (ours.bits - 1)
        values = values.reshape(*scales.shape, -1) * scales[..., None]
        return values.reshape(*scales.shape[:-1], -1)

    def expected(leaf: str, place: int) -> np.ndarray:
        w = weights.read(f"stacks/1/blocks/0/{leaf}", place)
        return np.asarray(dequantize(quantize(w, ours))).swapaxes(-1, -2)

    np.testing.assert_array_equal(stored("layers.1/attention/w_k"), expected("attention/w_k", 0))
    both = stored("layers.2/moe/experts.gate_up")
    np.testing.assert_array_equal(both[:, ::2], expected("moe/experts/w_gate", 1))
    np.testing.assert_array_equal(both[:, 1::2], expected("moe/experts/w_up", 1))
    np.testing.assert_array_equal(stored("layers.2/moe/experts.down"), expected("moe/experts/w_down", 1))
    np.testing.assert_array_equal(
        arrays["layers.2/moe/router/w"], weights.read("stacks/1/blocks/0/moe/router/w", 1)
    )


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_onnx_runtime_multiplies_quantised_weights(tmp_path, text, format):
    if not PYTHON.exists():
        pytest.skip("ONNX Runtime is not installed: python -m benchmarks.peers.environment onnxruntime")
    # With all experts chosen, rounded activations send no token elsewhere.
    moe = replace(MIXTRAL, expert_width=32, routing=TopK(k=4))
    model = fitting("mixtral", moe=moe)
    weights = written(tmp_path, model, text, format)
    rounded = RandomWeights(model)
    for name, array in weights.arrays.items():
        if name == "head" or name.rpartition("/")[2].startswith("w_"):
            own = format_named("int8" if name == "head" else format)
            rounded.arrays[name] = np.asarray(dequantize(quantize(array, own)))
    prompts = np.random.default_rng(0).integers(0, 250, (2, 16))
    ours = our_answer(model, rounded.read, prompts, 4)
    found = compare(prompts, ours, client_answer("run_onnxruntime", PYTHON, tmp_path, prompts, 4))
    assert found.vocabulary < 0.05, found


def test_onnxruntime_genai_is_told_what_the_model_is(tmp_path, text):
    written(tmp_path, fitting("glm4_moe"), text)
    said = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert (said["eos_token_id"], said["vocab_size"], said["context_length"]) == (256, 300, 64)
    decoder = said["decoder"]
    assert (decoder["num_key_value_heads"], decoder["head_size"], decoder["num_hidden_layers"]) == (2, 32, 3)
    graph = onnx.load(tmp_path / decoder["filename"], load_external_data=False).graph
    outputs = [value.name for value in graph.output]
    assert decoder["outputs"]["present_key_names"] % 2 in outputs


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODELS["deepseek_v3"], "no operators for model.attention=LatentAttentionConfig"),
        (MODELS["mixtral"], "head_width=8"),
        (
            fitting("mixtral", moe=replace(MIXTRAL, free_experts=FreeExperts(zero=1))),
            "model.moe.free_experts",
        ),
        (fitting("mixtral", moe=replace(MIXTRAL, routing=ExpertChoice())), "model.moe.routing=ExpertChoice"),
        (fitting("mixtral", moe=replace(MIXTRAL, expert_width=(16, 16, 32, 32))), "model.moe.expert_width="),
        (fitting("mixtral", layers="mM"), "model.layers=mM"),
    ],
)
def test_what_the_graph_cannot_express_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        check(model)


def test_how_training_computed_is_no_hindrance():
    check(fitting("mixtral", remat="full", moe=replace(MIXTRAL, dispatch=Capacity(1.5), tokens_per_group=8)))


def test_matrices_that_do_not_divide_into_blocks_are_refused(tmp_path, text):
    with pytest.raises(UserError, match="24 and 32 inputs of a matrix do not divide into 16"):
        written(tmp_path, fitting("mixtral", moe=replace(MIXTRAL, expert_width=24)), text, "int8")
