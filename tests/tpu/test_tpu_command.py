"""The command as a user runs it, as far as it goes without libtpu, and the layouts that a sweep tries."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from moe.errors import UserError
from moe.experiment import Experiment, Train
from moe.mesh import MeshConfig
from moe.nn import MoEConfig, TransformerConfig
from moe.routing import TopK
from tpu.analyse import compile_program
from tpu.lowered import Lowered, Serving
from tpu.operations import EvenLoads
from tpu.steps import STEPS
from tpu.sweep import factorings, layouts, ranking

ROOT = Path(__file__).parents[2]
CONFIG = "configs/olmoe_1b_7b.py"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((CONFIG, "--topology", "v9:2x2"), "no such chip; choose from v4"),
        ((CONFIG, "--topology", "v6e:2x2x2"), "write v6e:16x16"),
        ((CONFIG,), "--topology v6e:16x16"),
        ((CONFIG, "--topology", "v6e:2x4", "--step", "generate"), "choose from train, prefill, decode"),
        ((CONFIG, "--topology", "v6e:2x4", "--slots", "-1"), "--slots -1"),
        ((CONFIG, "--topology", "v6e:2x4", "--out", "nowhere/a.json"), "--out nowhere/a.json"),
        ((CONFIG, "--topology", "v6e:2x4", "--model.depth", "3"), "unknown field --model.depth"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(arguments, named):
    command = [sys.executable, "tpu/compile.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


def test_factorings_are_all_and_each_once():
    found = list(factorings(12, 3))
    assert len(found) == len(set(found)) == 18
    assert all(a * b * c == 12 for a, b, c in found)


EXPERIMENT = Experiment(
    model=TransformerConfig(
        width=64, layers="M", moe=MoEConfig(num_experts=4, expert_width=32, routing=TopK(k=1))
    ),
    train=Train(batch_size=16),
)


def test_layouts_are_those_that_model_and_batch_permit():
    found = layouts(EXPERIMENT, jax.devices()[:8], ("data", "expert"), "train", Serving())
    assert [(mesh.data, mesh.expert) for mesh in found] == [(2, 4), (4, 2), (8, 1)]  # 4 experts, not 8


@pytest.mark.parametrize(
    ("experiment", "serving", "named"),
    [
        (replace(EXPERIMENT, mesh=MeshConfig(tensor=2)), Serving(), "mesh.tensor=2"),
        (replace(EXPERIMENT, mesh=MeshConfig(expert=8)), Serving(), "mesh.expert=8"),
        (EXPERIMENT, Serving(slots=12), "--slots 12"),
        (EXPERIMENT, Serving(length=64, prompt=65), "--prompt 65"),
    ],
)
def test_generation_says_what_devices_cannot_share(experiment, serving, named):
    with pytest.raises(UserError, match=named):
        STEPS["decode"].check(experiment, serving, 8)


def test_a_sweep_of_an_axis_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--axes pipeline"):
        layouts(EXPERIMENT, jax.devices()[:8], ("pipeline",), "train", Serving())


def test_the_ranking_names_what_failed():
    worked = {
        "mesh": {"data": 4, "expert": 2},
        "mfu_compiler": 0.31,
        "mfu_roofline": 0.42,
        "bound": "HBM",
        "memory": {"parameters": 2**30},
        "collectives": [{"bytes": 5e9}],
        "compiled_over_expected": 1.01,
        "fits": True,
    }
    failed = {"mesh": {"data": 8, "expert": 1}, "error": "does not fit: needs 40 GiB"}
    lines = ranking([worked, failed])
    assert "data 4 x expert 2" in lines[1]
    assert "31.0%" in lines[1]
    assert "needs 40 GiB" in lines[2]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("UNIMPLEMENTED: not supported in limited ICI routing settings", "take Auto() or AllToAll()"),
        ("RESOURCE_EXHAUSTED: Used 16.3G of 15.7G hbm", "needs 16.3GiB of a device's 15.7GiB"),
    ],
)
def test_what_the_compiler_refuses_is_said_with_its_remedy(said, told):
    class Program:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    lowered = Lowered(Program(), {}, 0, 0.0, 0.0, EvenLoads(0.0))
    with pytest.raises(UserError, match=re.escape(told)):
        compile_program(lowered)
