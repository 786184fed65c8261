"""GGUF files: what stands in them, what llama.cpp does otherwise, and what it answers where it is built."""

import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import HEADS, MODELS, WITHOUT, RandomWeights

from moe.errors import UserError
from moe.export.architecture import choose
from moe.export.architectures import ARCHITECTURES
from moe.export.gguf_file import check, write_gguf
from moe.export.hugging_face import Text
from moe.export.verify import client_answer, compare, our_answer
from moe.nn import TransformerConfig
from moe.routing import TopK

PYTHON = Path(__file__).parents[2] / ".peers" / "llama_cpp" / "bin" / "python"

# llama.cpp knows no dense layers here, divides by the sum of the weights always or never, and has no grouped
# queries in OLMoE.
FITTING = {
    "qwen3moe": replace(
        MODELS["qwen3_moe"], layers="MM", moe=replace(MODELS["qwen3_moe"].moe, routing=TopK(k=2))
    ),
    "glm4moe": MODELS["glm4_moe"],
    "olmoe": replace(
        MODELS["olmoe"],
        attention=replace(HEADS, kv_heads=4, qk_norm="full"),
        moe=replace(MODELS["olmoe"].moe, routing=TopK(k=2, renormalize=False)),
    ),
    "llama": MODELS["mixtral"],
    "qwen2moe": replace(
        MODELS["qwen2_moe"],
        layers="MM",
        moe=replace(MODELS["qwen2_moe"].moe, routing=TopK(k=2, renormalize=False)),
    ),
    "deepseek2": MODELS["deepseek_v3"],
    "qwen3": MODELS["qwen3"],
    "glm4moe without shared experts": WITHOUT["glm4_moe"],
}


@pytest.fixture(autouse=True)
def _mesh(one_device):
    pass


def written(path: Path, model: TransformerConfig, text: Text, precision="float32") -> RandomWeights:
    weights = RandomWeights(model)
    architecture = choose(ARCHITECTURES, model)
    write_gguf(path, architecture, model, weights.read, text, name="tiny", precision=precision)
    return weights


@pytest.mark.parametrize("name", FITTING)
def test_llama_cpp_says_what_our_model_says(tmp_path, text, name):
    if not PYTHON.exists():
        pytest.skip("llama.cpp is not built: python -m benchmarks.peers.environment llama_cpp")
    path, model = tmp_path / "tiny.gguf", FITTING[name]
    weights = written(path, model, text)
    prompts = np.random.default_rng(0).integers(0, 250, (2, 16))
    ours, theirs = (
        our_answer(model, weights.read, prompts, 4),
        client_answer("run_llama_cpp", PYTHON, path, prompts, 4),
    )
    found = compare(prompts, ours, theirs)
    assert found.exact, found


def test_a_file_says_what_the_model_is(tmp_path, text):
    model = MODELS["glm4_moe"]
    weights = written(tmp_path / "tiny.gguf", model, text)
    file = gguf.GGUFReader(tmp_path / "tiny.gguf")
    fields = {name: file.get_field(name).contents() for name in file.fields if not name.startswith("GGUF.")}
    said = {
        "general.architecture": "glm4moe",
        "glm4moe.block_count": 3,
        "glm4moe.leading_dense_block_count": 1,
        "glm4moe.rope.dimension_count": 8,
        "glm4moe.expert_shared_count": 2,
        "glm4moe.expert_group_count": 2,
        "glm4moe.expert_group_used_count": 1,
        "glm4moe.expert_weights_scale": 1.5,
        "tokenizer.ggml.eos_token_id": 256,
    }
    assert {name: fields[name] for name in said} == said
    assert len(fields["tokenizer.ggml.tokens"]) == 300
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    router = weights.arrays["stacks/1/blocks/0/moe/router/w"]
    np.testing.assert_array_equal(tensors["blk.2.ffn_gate_inp.weight"], router[1].T)
    experts = weights.arrays["stacks/1/blocks/0/moe/experts/w_down"]
    np.testing.assert_array_equal(tensors["blk.1.ffn_down_exps.weight"], experts[0].swapaxes(1, 2))


def test_eight_bits_are_those_of_the_gguf_package(tmp_path, text):
    weights = written(tmp_path / "tiny.gguf", MODELS["mixtral"], text, "q8_0")
    kinds = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert kinds["blk.0.ffn_gate_inp.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert kinds["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert kinds["blk.0.ffn_down_exps.weight"].tensor_type == gguf.GGMLQuantizationType.F16  # 16 wide
    stored = kinds["blk.1.ffn_gate_exps.weight"]
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    expected = weights.arrays["stacks/0/blocks/0/moe/experts/w_gate"][1].swapaxes(1, 2)
    found = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 127)


QUANTIZE = """
import sys, llama_cpp
wanted = llama_cpp.llama_model_quantize_default_params()
wanted.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(*(path.encode() for path in sys.argv[1:]), wanted))
"""
WIDE = {"vocab_size": 300, "width": 256, "layers": 9 * "M", "attention": HEADS}


def as_numbers(tensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(
    "model",
    [
        replace(
            MODELS["mixtral"], **WIDE, moe=replace(MODELS["mixtral"].moe, num_experts=8, expert_width=256)
        ),
        replace(MODELS["mixtral"], **WIDE, moe=replace(MODELS["mixtral"].moe, expert_width=64)),
        replace(MODELS["glm4_moe"], width=256, dense_width=512),
    ],
    ids=["eight experts", "narrow experts", "dense layers first"],
)
def test_q4_k_m_is_the_mix_that_llama_cpp_makes(tmp_path, text, model):
    if not PYTHON.exists():
        pytest.skip("llama.cpp is not built: python -m benchmarks.peers.environment llama_cpp")
    names = [tmp_path / f"{name}.gguf" for name in ("float32", "theirs", "ours")]
    written(names[0], model, text)
    written(names[2], model, text, "q4_k_m")
    subprocess.run([PYTHON, "-c", QUANTIZE, names[0], names[1]], check=True, capture_output=True)
    exact, theirs, ours = ({t.name: t for t in gguf.GGUFReader(name).tensors} for name in names)
    assert {n: t.tensor_type.name for n, t in ours.items()} == {
        n: t.tensor_type.name for n, t in theirs.items()
    }
    for name, tensor in exact.items():
        x = as_numbers(tensor)
        error, their_error = (np.square(as_numbers(found[name]) - x).mean() for found in (ours, theirs))
        assert error <= 1.05 * their_error, name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODELS["qwen3_moe"], "renormalize=True, not False"),
        (replace(FITTING["qwen3moe"], layers="DM"), "no dense layers"),
        (MODELS["olmoe"], "renormalize=False, not True"),
        (replace(FITTING["olmoe"], tied_embedding=True), "output head of its own"),
        (replace(FITTING["olmoe"], attention=MODELS["olmoe"].attention), "kv_heads as wide as the model"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        check(choose(ARCHITECTURES, model), model)
