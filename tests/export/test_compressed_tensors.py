"""Quantised checkpoints: what stands in them, and what compressed-tensors and transformers make of it."""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny import MODELS, WITHOUT, RandomWeights

from moe.data import Bytes
from moe.errors import UserError
from moe.export.architecture import choose
from moe.export.architectures import ARCHITECTURES
from moe.export.assemble import assemble
from moe.export.compressed_tensors import check_format, pack
from moe.export.hugging_face import Text, write_checkpoint
from moe.export.importing import HuggingFaceWeights, architecture_of, read_config
from moe.export.stored import StoredWeights
from moe.export.verify import CLIENTS, Answer, compare, our_answer
from moe.mesh import MeshConfig, make_mesh
from moe.nn.quantized import quantize_params
from moe.quant import QuantizedMatrix, dequantize, format_named, quantize

SCRIPT = Path(__file__).with_name("decompressed_by_transformers.py")
NEW_TOKENS = 4
WRITTEN = {f"{name} int4-8": (model, "int4-8") for name, model in MODELS.items()} | {
    f"{name} {format}": (model, format)
    for name, model in {"qwen3_moe": MODELS["qwen3_moe"], "glm4_moe": WITHOUT["glm4_moe"]}.items()
    for format in ("int8", "int8-dynamic", "fp8")
}


@pytest.fixture(autouse=True)
def _mesh(one_device):
    pass


def stored(model, format: str) -> StoredWeights:
    architecture = choose(ARCHITECTURES, model)
    return StoredWeights(architecture, model, RandomWeights(model).read, "float32", format_named(format))


def write(folder: Path, model, format: str) -> StoredWeights:
    """A checkpoint of random weights."""
    weights = stored(model, format)
    folder.mkdir()
    vocabulary = folder.parent / "tokenizer.json"
    Bytes().build([]).save(str(vocabulary))
    write_checkpoint(folder, weights, Text(vocabulary, "<|endoftext|>", 64))
    return weights


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_codes_lie_in_words_low_bits_first(outputs, inputs, bits, seed):
    largest = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(seed).integers(-largest, largest + 1, (outputs, inputs)).astype(np.int8)
    words = pack(codes, bits)
    assert words.dtype == np.int32
    each = 32 // bits
    assert words.shape == (outputs, -(-inputs // each))
    for (row, place), code in np.ndenumerate(codes):
        word = int(words[row, place // each]) & 0xFFFFFFFF
        assert (word >> bits * (place % each)) % 2**bits - 2 ** (bits - 1) == code


@pytest.mark.parametrize("format", ["int4-8", "int8-dynamic"])
def test_what_is_read_back_is_what_evaluation_dequantises(format):
    model = MODELS["deepseek_v3"]
    weights = stored(model, format)
    _, params, _ = assemble(model, RandomWeights(model).read)
    rounded = quantize_params(params, format_named(format), np.dtype("float32"))
    for path, variable in nnx.to_flat_state(rounded):
        name, value = "/".join(map(str, path)), variable[...]
        if name == "head":  # of eight bits in ours, plain in engines
            continue
        whole = np.asarray(value if not hasattr(value, "scales") else dequantize(value))
        places = range(len(whole)) if name.startswith("stacks") else [None]
        for place in places:
            expected = whole if place is None else whole[place]
            assert weights.read(name, place).tobytes() == expected.tobytes(), name


def test_codes_that_the_run_holds_are_stored_as_they_are():
    """As GPTQ leaves them: here each one above the nearest."""
    model, format = MODELS["mixtral"], format_named("int4-8")
    read = RandomWeights(model).read

    def held(leaf, place):
        if "/w_" not in leaf:
            return None
        nearest = quantize(read(leaf, place), format)
        codes = jnp.minimum(jnp.swapaxes(nearest.codes(), -1, -2) + 1, 7)
        return QuantizedMatrix.of_codes(codes, jnp.swapaxes(nearest.scales, -1, -2), format)

    weights = StoredWeights(choose(ARCHITECTURES, model), model, read, "float32", format, held)
    slot = next(slot for slot in weights.slots if slot.leaf.endswith("experts/w_down"))
    matrices = held(slot.leaf, slot.repetition)
    assert (weights.read(slot.leaf, slot.repetition) == np.asarray(dequantize(matrices))).all()
    packed, scales, _ = list(weights.tensors(slot))[3:6]  # of the second expert
    assert (packed == pack(np.asarray(matrices.codes())[1], 4)).all()
    assert (scales == np.asarray(matrices.scales, np.float32)[1]).all()


def test_routers_embeddings_and_head_stay_plain(tmp_path):
    write(tmp_path / "tiny", MODELS["qwen2_moe"], "int8")
    tensors = safetensors.numpy.load_file(tmp_path / "tiny" / "model.safetensors")
    plain = {name for name, array in tensors.items() if array.dtype == np.float32 and array.ndim == 2}
    plain = {name for name in plain if not name.endswith("_scale")}
    in_layers = {"model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"}
    in_layers |= {name.replace(".0.", ".2.") for name in in_layers}
    ignored = read_config(tmp_path / "tiny")["quantization_config"]["ignore"]
    assert set(ignored) == in_layers | {"lm_head"}
    assert plain == {f"{name}.weight" for name in (*ignored, "model.embed_tokens")}


@pytest.mark.parametrize(
    ("format", "message"),
    [("int4-32", "group_size=32 does not divide the 16 inputs"), ("int4", "does not divide")],
)
def test_groups_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, format, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "tiny", MODELS["mixtral"], format)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_groups_that_split_a_word_are_refused():
    with pytest.raises(UserError, match="words of 32 bits hold 8 codes"):
        check_format(format_named("int4-4"))


def test_a_quantised_checkpoint_is_not_taken_in(tmp_path):
    write(tmp_path / "tiny", MODELS["mixtral"], "int8")
    with pytest.raises(UserError, match="the weights are quantised"):
        architecture_of(read_config(tmp_path / "tiny"), ARCHITECTURES)


@pytest.fixture(scope="module")
def folder(transformers_python, tmp_path_factory) -> Path:
    """What we wrote, and compressed-tensors and transformers made of it."""
    folder = tmp_path_factory.mktemp("compressed")
    np.save(folder / "prompts.npy", np.random.default_rng(0).integers(0, 300, (2, 16)))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        for name, (model, format) in WRITTEN.items():
            write(folder / name, model, format)
    command = [transformers_python, SCRIPT, CLIENTS, folder]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_compressed_tensors_reads_our_dequantised_weights(folder, name):
    weights = stored(*WRITTEN[name])
    config = json.loads((folder / f"{name}-plain" / "config.json").read_text())
    plain = HuggingFaceWeights(folder / f"{name}-plain", weights.architecture, config)
    for leaf, place in plain.places:
        assert plain.read(leaf, place).tobytes() == weights.read(leaf, place).tobytes(), leaf


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_loads_the_same_by_itself(folder, name):
    alone, plain = (np.load(folder / f"{name}{kind}.npz") for kind in ("", "-plain"))
    for key in ("log_probabilities", "greedy"):
        np.testing.assert_array_equal(alone[key], plain[key])


def test_our_model_says_the_same_with_dequantised_weights(folder):
    name, prompts = "glm4_moe int4-8", np.load(folder / "prompts.npy")
    model, _ = WRITTEN[name]
    found = np.load(folder / f"{name}.npz")
    theirs = Answer(found["log_probabilities"], found["greedy"])
    ours = our_answer(model, stored(*WRITTEN[name]).read, prompts, NEW_TOKENS)
    assert compare(prompts, ours, theirs).exact
