"""Checkpoints that transformers wrote and answers that it gives, against ours."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny import MODELS

from moe.data import Bytes
from moe.export.architectures import ARCHITECTURES
from moe.export.hugging_face import Text, write_checkpoint
from moe.export.importing import HuggingFaceWeights, architecture_of, read_config
from moe.export.stored import StoredWeights
from moe.export.verify import CLIENTS, Answer, compare, our_answer

SCRIPT = Path(__file__).with_name("checkpoints_by_transformers.py")
NEW_TOKENS = 4


def run_script(python: Path, folder: Path) -> None:
    ended = subprocess.run([python, SCRIPT, CLIENTS, folder], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.fixture(scope="module")
def folder(transformers_python, tmp_path_factory) -> Path:
    """What transformers wrote and answered."""
    folder = tmp_path_factory.mktemp("checkpoints")
    np.save(folder / "prompts.npy", np.random.default_rng(0).integers(0, 300, (2, 16)))
    run_script(transformers_python, folder)
    return folder


def answered(path: Path) -> Answer:
    found = np.load(path)
    return Answer(found["log_probabilities"], found["greedy"])


def opened(checkpoint: Path) -> tuple:
    """Architecture, model and weights of a checkpoint."""
    config = read_config(checkpoint)
    architecture = architecture_of(config, ARCHITECTURES)
    return architecture, architecture.model(config), HuggingFaceWeights(checkpoint, architecture, config)


@pytest.mark.parametrize("name", MODELS)
def test_our_model_says_what_transformers_says(one_device, folder, name):
    prompts = np.load(folder / "prompts.npy")
    _, model, weights = opened(folder / name)
    found = compare(
        prompts, our_answer(model, weights.read, prompts, NEW_TOKENS), answered(folder / f"{name}.npz")
    )
    assert found.exact, found


@pytest.mark.parametrize("name", MODELS)
def test_fused_experts_hold_the_same(one_device, folder, name):
    _, _, single = opened(folder / name)
    _, _, fused = opened(folder / f"{name}-fused")
    for leaf, place in single.places:
        assert fused.read(leaf, place).tobytes() == single.read(leaf, place).tobytes(), leaf


def test_what_we_write_of_them_is_the_same_to_transformers(one_device, folder, transformers_python):
    vocabulary = folder / "tokenizer.json"
    Bytes().build([]).save(str(vocabulary))
    for name in MODELS:
        architecture, model, weights = opened(folder / name)
        again = folder / f"{name}-again"
        again.mkdir()
        text = Text(vocabulary, "<|endoftext|>", 64)
        write_checkpoint(again, StoredWeights(architecture, model, weights.read), text)
        before = safetensors.numpy.load_file(folder / name / "model.safetensors")
        after = safetensors.numpy.load_file(again / "model.safetensors")
        assert before.keys() == after.keys()
        for tensor, array in before.items():
            assert (array.dtype, array.shape) == (after[tensor].dtype, after[tensor].shape), tensor
            assert array.tobytes() == after[tensor].tobytes(), tensor

    run_script(transformers_python, folder)
    for name in MODELS:
        before, after = answered(folder / f"{name}.npz"), answered(folder / f"{name}-again.npz")
        np.testing.assert_array_equal(after.log_probabilities, before.log_probabilities)
        np.testing.assert_array_equal(after.greedy, before.greedy)
