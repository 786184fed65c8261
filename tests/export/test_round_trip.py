"""Ours to Hugging Face and back: every bit, every tensor, nothing else."""

import json

import numpy as np
import pytest
import safetensors.numpy
from tiny import MODELS, WITHOUT, RandomWeights

from moe.errors import UserError
from moe.export.architecture import choose
from moe.export.architectures import ARCHITECTURES
from moe.export.hugging_face import write_weights
from moe.export.importing import HuggingFaceWeights, architecture_of
from moe.export.safetensors_file import INDEX, SafetensorsFolder
from moe.export.stored import StoredWeights
from moe.nn import TransformerConfig

ALL = {f"{name}": model for name, model in MODELS.items()} | {
    f"{name} without": model for name, model in WITHOUT.items()
}


@pytest.fixture(autouse=True)
def _mesh(one_device):
    pass


def written(folder, model: TransformerConfig, *, precision="float32", shard_bytes=10**9):
    """An export of random weights: those, and how to read the folder."""
    architecture, weights = choose(ARCHITECTURES, model), RandomWeights(model)
    write_weights(folder, StoredWeights(architecture, model, weights.read, precision), shard_bytes)
    config = json.loads(json.dumps(architecture.config(model)))
    return weights, lambda: HuggingFaceWeights(folder, architecture, config)


def stacked(weights: HuggingFaceWeights, leaf: str, like: np.ndarray) -> np.ndarray:
    """A parameter of ours, read layer by layer."""
    if not leaf.startswith("stacks"):
        return weights.read(leaf, None)
    return np.stack([weights.read(leaf, place) for place in range(len(like))])


@pytest.mark.parametrize("name", ALL)
def test_every_bit_comes_back(tmp_path, name):
    weights, read = written(tmp_path, ALL[name])
    again = read()
    again.check_zeros()
    assert again.left_out == []
    for leaf, array in weights.arrays.items():
        found = stacked(again, leaf, array)
        assert found.dtype == np.float32
        assert found.tobytes() == array.tobytes(), leaf


def test_several_files_hold_the_same(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, size in ((whole, 10**9), (parts, 20_000)):
        folder.mkdir()
        written(folder, MODELS["glm4_moe"], shard_bytes=size)
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((parts / INDEX).read_text())
    expected = safetensors.numpy.load_file(whole / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    for name, array in expected.items():
        in_its_file = safetensors.numpy.load_file(parts / index["weight_map"][name])
        assert in_its_file[name].tobytes() == array.tobytes()


def test_lower_precision_rounds_all_but_the_bias_of_the_choice(tmp_path):
    weights, read = written(tmp_path, MODELS["glm4_moe"], precision="bfloat16")
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    kept = {name for name, array in stored.items() if array.dtype == np.float32}
    assert kept == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    embedding = read().read("embedding", None)
    np.testing.assert_allclose(embedding, weights.arrays["embedding"], rtol=2**-8)
    assert embedding.tobytes() != weights.arrays["embedding"].tobytes()


def rewritten(folder, change):
    """The checkpoint after a change of its tensors by name."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"no tensor {GATE}"),
        (lambda t: t.update({GATE: np.zeros((16, 31), np.float32)}), r"is \[16, 31\], .* \[16, 32\]"),
        (lambda t: t.update({"model.layers.0.self_attn.sinks": np.zeros(4, np.float32)}), "self_attn.sinks"),
        (lambda t: t.update({"model.layers.1.mlp.experts.4.up_proj.weight": t[GATE]}), "experts.4.up_proj"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, change, message):
    _, read = written(tmp_path, MODELS["qwen3_moe"])
    rewritten(tmp_path, change)
    with pytest.raises(UserError, match=message):
        read()


def test_a_layer_that_predicts_further_tokens_is_left_out_and_named(tmp_path):
    _, read = written(tmp_path, MODELS["glm4_moe"])
    rewritten(tmp_path, lambda t: t.update({"model.layers.3.eh_proj.weight": np.zeros(4, np.float32)}))
    assert read().left_out == ["model.layers.3.eh_proj.weight"]


def test_a_part_of_zeros_that_is_not_zero_is_refused(tmp_path):
    _, read = written(tmp_path, WITHOUT["glm4_moe"])
    read().check_zeros()
    rewritten(tmp_path, lambda t: t["model.layers.1.mlp.shared_experts.up_proj.weight"].fill(1.0))
    with pytest.raises(UserError, match=r"up_proj\.weight is not zero"):
        read().check_zeros()


def test_fused_experts_are_read_as_well(tmp_path):
    weights, read = written(tmp_path, MODELS["mixtral"])

    def fuse(tensors):
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            experts = {
                w: np.stack(
                    [tensors.pop(f"{prefix}block_sparse_moe.experts.{e}.{w}.weight") for e in range(4)]
                )
                for w in ("w1", "w2", "w3")
            }
            tensors[f"{prefix}mlp.experts.gate_up_proj"] = np.concatenate(
                [experts["w1"], experts["w3"]], axis=1
            )
            tensors[f"{prefix}mlp.experts.down_proj"] = experts["w2"]
            tensors[f"{prefix}mlp.gate.weight"] = tensors.pop(f"{prefix}block_sparse_moe.gate.weight")

    rewritten(tmp_path, fuse)
    for leaf, array in weights.arrays.items():
        assert stacked(read(), leaf, array).tobytes() == array.tobytes(), leaf


def test_damage_is_named(tmp_path):
    _, read = written(tmp_path, MODELS["mixtral"], shard_bytes=20_000)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    sound = file.read_bytes()

    for damaged in (
        sound[:-5],
        sound + b"more",
        b"\xff" * 8 + sound[8:],
        sound[:12] + b"}" + sound[13:],
        b"",
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file.name} is damaged"):
            read()
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        read()
    (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match="fetch the others"):
        read()
    file.write_bytes(sound)
    for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"lm_head.weight": 1}}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(UserError, match=f"{INDEX} cannot be read"):
            read()


@pytest.mark.parametrize("name", ["glm4_moe without", "deepseek_v3"])
def test_a_config_that_makes_no_sense_is_told_in_one_line(tmp_path, name):
    architecture = choose(ARCHITECTURES, ALL[name])
    written(tmp_path, ALL[name])
    config = json.loads(json.dumps(architecture.config(ALL[name])))
    refused = set()
    for key in config:
        for value in ("x", -1, 0, [], {}, 1.5):
            changed = config | {key: value}
            try:
                HuggingFaceWeights(tmp_path, architecture_of(changed, ARCHITECTURES), changed)
            except UserError as error:
                assert "\n" not in str(error)
                refused.add(key)
    assert {"model_type", "hidden_size", "num_attention_heads", "rope_parameters"} <= refused


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(UserError, match="model_type='gpt_oss' is not supported; supported are qwen3_moe"):
        architecture_of({"model_type": "gpt_oss"}, ARCHITECTURES)


def test_a_pickle_under_the_name_of_safetensors_is_not_opened(tmp_path):
    written(tmp_path, MODELS["mixtral"])
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        SafetensorsFolder(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no"):
        SafetensorsFolder(tmp_path)
