"""Training for quantised weights, measuring what they cost, and calibrating, as a user does."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from workshop import TINY, Workshop, fingerprint, lines

from moe.export.weights import CheckpointWeights
from moe.quant import format_named


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Path:
    """A run that trains for int4, and evaluates itself with such weights."""
    command = ("train.py", TINY, "--train.steps", "12", "--quantization.train", "int4-8")
    assert workshop.call(*command, "--model.moe.routing.scores", "sigmoid").code == 0
    return workshop.runs / "tiny"


def measured(workshop: Workshop, run: Path, *arguments: str) -> tuple[dict, str]:
    ended = workshop.call("eval.py", str(run), *arguments)
    assert ended.code == 0, ended.err
    newest = max((run / "report").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text()), ended.out


def test_a_run_that_trains_for_int4_evaluates_itself_with_it(workshop: Workshop, run: Path):
    told = lines(run)[-1]
    report, out = measured(workshop, run, "--quantize", "int4-8")
    total = report["total"]
    # Training takes the head's weights as one bfloat16 matrix would be taken; here float32, so to rounding.
    assert told["validation/loss"] == pytest.approx(total["loss_after"], rel=1e-4)
    assert told["validation/loss"] != pytest.approx(total["loss_before"], rel=1e-6)
    for name, found in report["slices"].items():
        assert told[f"validation/loss/{name}"] == pytest.approx(found["loss_after"], rel=1e-4)
        bits = found["loss_after"] * found["targets"] / math.log(2)
        assert found["bits_per_byte_after"] == pytest.approx(bits / found["text_bytes"], rel=1e-6)
    assert "prose" in out
    assert "code" in out
    assert sum(report["bytes_after"].values()) < sum(report["bytes_before"].values())
    assert [each["batch"] for each in report["speed"]] == [8, 64]
    assert all(speed > 0 for each in report["speed"] for speed in each["prefill"] + each["decode"])
    assert "tokens a second" in out


def test_sensitivity_of_layers_and_experts(workshop: Workshop, run: Path):
    report, out = measured(
        workshop, run, "--quantize", "int8", "--skip-speed", "--sensitivity", "--tokens", "256"
    )
    found = report["sensitivity"]
    assert len(found["layers"]) == 2
    assert [len(experts) for experts in found["experts"].values()] == [8, 8]
    assert all(0 < max(experts) < 0.1 for experts in found["experts"].values())
    assert "sensitivity" in out


def test_a_calibrated_run_is_measured_beside_its_source_and_by_itself(workshop: Workshop, run: Path):
    before = fingerprint(run / "checkpoints")
    command = ("moe/compress/calibrate.py", "runs/tiny", "--format", "int4-8", "--out", "runs/small")
    ended = workshop.call(*command, "--tokens", "2048")
    assert ended.code == 0, ended.err
    assert fingerprint(run / "checkpoints") == before
    beside, _ = measured(workshop, run, "--quantize", str(workshop.runs / "small"), "--skip-speed")
    alone, _ = measured(workshop, workshop.runs / "small")
    assert beside["quantized"] == "small"
    assert alone["total"]["loss"] == pytest.approx(beside["total"]["loss_after"], rel=1e-4)
    assert abs(beside["total"]["relative_increase"]) < 0.1

    prompt = ("--prompt", "Once", "--temperature", "0", "--max-new-tokens", "8", "--ignore-end")
    texts = [
        workshop.call("generate.py", *where, *prompt)
        for where in (("runs/small",), ("runs/tiny", "--quantize", "int8"))
    ]
    assert all(text.code == 0 and text.out.startswith("Once") for text in texts), texts

    exported = workshop.call("export.py", "runs/small", "--to", "hf", "--out", "exports/small")
    assert exported.code == 0, exported.err
    tensors = safetensors.numpy.load_file(workshop.folder / "exports" / "small" / "model.safetensors")
    newest = max((workshop.runs / "small" / "checkpoints").iterdir())
    weights = CheckpointWeights(newest, format_named("int4-8"))
    held = weights.quantized("stacks/0/blocks/0/moe/experts/w_up", 0)
    assert held is not None
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    codes = np.asarray(held.codes())[3] + 8
    words = tensors[f"{name}_packed"].astype(np.int64) & 0xFFFFFFFF
    assert (np.stack([words >> 4 * i & 15 for i in range(8)], -1).reshape(codes.shape) == codes).all()
    assert (tensors[f"{name}_scale"] == np.asarray(held.scales, np.float32)[3]).all()
    told = workshop.call("export.py", "runs/small", "--to", "hf", "--quantize", "int8", "--out", "exports/x")
    assert (told.code, "holds int4-8 weights already" in told.err) == (2, True)

    again = workshop.call(*command)
    assert (again.code, "holds quantised weights already" in again.err) == (2, True)
    twice = workshop.call("eval.py", "runs/small", "--quantize", "int8")
    assert (twice.code, "quantised already" in twice.err) == (2, True)
    made = workshop.call("generate.py", "runs/small", "--prompt", "a", "--quantize", "int8")
    assert (made.code, "quantised already" in made.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantize", "int3"), "'int3' is no format; say int8"),
        (("--sensitivity",), "--sensitivity is to a number format"),
        (("--quantize", "int4"), "group_size=32 does not divide the 16 inputs"),
        (("--quantize", "runs"), "config.json is missing"),
    ],
)
def test_what_cannot_be_measured_is_refused(workshop: Workshop, run: Path, arguments, message):
    ended = workshop.call("eval.py", "runs/tiny", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
