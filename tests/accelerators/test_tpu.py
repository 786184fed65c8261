"""Ahead-of-time compilation for TPU, on any machine: `uv run --extra dev --extra tpu pytest -n 0 -m tpu`."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe.balance import LoadBalanceLoss
from moe.experiment import Experiment, Train
from moe.mesh import MeshConfig
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig
from moe.routing import TopK
from tpu.analyse import analyse
from tpu.lowered import Serving

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu (extra tpu)"),
]

ROOT = Path(__file__).parents[2]

MODEL = TransformerConfig(
    vocab_size=1024,
    width=512,
    layers="DMM",
    dense_width=1024,
    attention=AttentionConfig(heads=4, kv_heads=2, head_width=128, qk_norm="full"),
    moe=MoEConfig(
        num_experts=32,
        expert_width=512,
        routing=TopK(k=2),
        balance=(LoadBalanceLoss(0.01),),
        shared_experts=1,
    ),
    remat="full",
)
EXPERIMENT = Experiment(model=MODEL, mesh=MeshConfig(expert=2), train=Train(batch_size=64, loss_chunks=2))


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """libtpu takes its flags once for all topologies, and those of one generation are refused by another."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_a_train_step_costs_what_the_model_does_and_keeps_experts_apart(topology):
    analysis, _ = analyse(EXPERIMENT, topology, "train", Serving())
    # A dense expansion, or an operation that every device repeats, would show here many times over.
    assert analysis.flops["compiled"] == pytest.approx(analysis.flops["expected"], rel=0.03)
    assert analysis.flops["experts"] > 0
    assert analysis.flops["attention"] > 0
    assert analysis.gathered_experts == ()
    assert analysis.fits
    axes = {axis for sent in analysis.collectives for axis in sent.axes.split("+")}
    assert len(axes) > 1
    assert "expert" in axes


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_generation_costs_what_the_model_does_and_copies_no_cache(step, topology):
    serving = Serving(slots=64, length=2048, prompt=256)
    analysis, program = analyse(EXPERIMENT, topology, step, serving)
    assert analysis.flops["compiled"] == pytest.approx(analysis.flops["expected"], rel=0.03)
    assert analysis.flops["experts"] > 0
    assert analysis.gathered_experts == ()
    # Of 2 kinds, 3 layers, 8 slots of a device, 2048 places, 2 heads of 128 numbers of 2 bytes.
    assert analysis.memory["cache"] == 2 * 3 * 8 * 2048 * 2 * 128 * 2
    assert analysis.tokens == (64 if step == "decode" else 8 * 256)
    # Staged in VMEM it may be, of so small a model, but not laid out anew.
    assert not re.search(r"= bf16\[8,2,2048,128\]\S* copy\(", program)
    assert {axis for sent in analysis.collectives for axis in sent.axes.split("+")} >= {"expert"}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_loop_over_layers_costs_what_the_layers_do_one_by_one(remat):
    looped, unrolled = (
        analyse(
            replace(EXPERIMENT, model=replace(MODEL, remat=remat, unroll=unroll)),
            "v5e:2x4",
            "train",
            Serving(),
        )[0]
        for unroll in (False, True)
    )
    assert looped.flops["compiled"] == pytest.approx(unrolled.flops["compiled"], rel=0.01)
    assert looped.flops["compiled"] == pytest.approx(looped.flops["expected"], rel=0.03)


@pytest.mark.parametrize("group", [0, 1])
def test_the_pass_that_counts_an_accumulated_batch_is_expected(group):
    """A balance loss over the whole batch needs its totals before the first gradient."""
    moe = replace(MODEL.moe, balance=(LoadBalanceLoss(0.01, sequences_per_group=group),))
    train = replace(EXPERIMENT.train, accumulation=2)
    experiment = replace(EXPERIMENT, model=replace(MODEL, moe=moe), train=train)
    analysis, _ = analyse(experiment, "v5e:2x4", "train", Serving())
    assert analysis.flops["compiled"] == pytest.approx(analysis.flops["expected"], rel=0.03)


def test_the_command_writes_what_it_found(tmp_path):
    words = (
        "--topology v6e:2x4 --model.layers M --model.width 512 --model.moe.num-experts 8 --train.batch-size 8"
    )
    fields = (
        "--data.sequence-length 256 --model.moe.expert-width 256 --model.vocab-size 512 --train.loss-chunks 1"
    )
    command = [sys.executable, "tpu/compile.py", "configs/qwen3_30b_a3b.py", *words.split(), *fields.split()]
    out = tmp_path / "found.json"
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(out.read_text())
    assert "fits" in done.stdout
    assert f"MFU {found['mfu_roofline']:.1%}" in done.stdout
    assert found["compiled_over_expected"] == pytest.approx(1, abs=0.03)
