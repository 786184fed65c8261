"""The StableHLO program, run by a process that has JAX and none of our code."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import MODELS, RandomWeights

from moe.data import Bytes
from moe.export.hugging_face import Text
from moe.export.stablehlo import PROGRAM, write_stablehlo
from moe.export.verify import client_answer, compare, our_answer
from moe.mesh import MeshConfig, make_mesh

MODEL = MODELS["glm4_moe"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    tokenizer = folder / "from.json"
    Bytes().build([]).save(str(tokenizer))
    text = Text(tokenizer, "<|endoftext|>", 24)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        write_stablehlo(folder, MODEL, RandomWeights(MODEL).read, text, precision="float32")
    return folder


@pytest.mark.parametrize("rows", [1, 3])
def test_it_says_what_our_model_says_for_any_batch(one_device, exported, rows):
    prompts = np.random.default_rng(rows).integers(0, 300, (rows, 16))
    ours = our_answer(MODEL, RandomWeights(MODEL).read, prompts, 4)
    found = compare(prompts, ours, client_answer("run_stablehlo", Path(sys.executable), exported, prompts, 4))
    assert found.exact, found


def test_it_is_for_all_platforms(exported):
    program = jax.export.deserialize(bytearray((exported / PROGRAM).read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    assert str(program.in_avals[-1].shape) == "(b, 24)"
