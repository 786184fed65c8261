"""Runs that leave as checkpoints, and checkpoints that become runs, by export.py."""

import json
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from workshop import ROOT, TINY, Workshop, checkpoint, lines

from moe.named_arrays import named_leaves

SIGMOID = ("--model.moe.routing.scores", "sigmoid")
PYTHON = ROOT / ".peers" / "transformers" / "bin" / "python"


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Workshop:
    """A workshop with a run of sigmoid scores, a biased choice and a moving average."""
    ended = workshop.call("train.py", TINY, "--name", "trained", "--train.steps", "8", *SIGMOID)
    assert (ended.code, ended.err) == (0, "")
    return workshop


def export(workshop: Workshop, *arguments: str):
    return workshop.call("export.py", "runs/trained", *arguments)


def test_a_run_comes_back_bit_by_bit(trained: Workshop):
    ended = export(trained, "--out", "out/hf")
    assert (ended.code, ended.err) == (0, "")
    assert "transformers" in ended.out
    card = (trained.folder / "out" / "hf" / "README.md").read_text()
    assert "moving average at step 8" in card
    assert "| all | " in card

    ended = trained.call("export.py", "--from", "hf", "out/hf", "--out", "runs/again", *TEXTS)
    assert (ended.code, ended.err) == (0, "")
    state, again = checkpoint(trained.runs / "trained", 8).state, checkpoint(trained.runs / "again", 0).state
    for whole, part in ((state.average, again.params), (state.controllers, again.controllers)):
        before, after = named_leaves(whole), named_leaves(part)
        assert before.keys() == after.keys()
        for name, leaf in before.items():
            assert np.asarray(leaf).tobytes() == np.asarray(after[name]).tobytes(), name


TEXTS = ("--data.corpus", "TextFiles(('texts',))", "--data.sequence-length", "32")


def test_what_was_taken_in_is_measured_and_trained(trained: Workshop):
    if not (trained.runs / "again").exists():
        export(trained, "--out", "out/hf")
        trained.call("export.py", "--from", "hf", "out/hf", "--out", "runs/again", *TEXTS)
    losses = {}
    for run in ("trained", "again"):
        ended = trained.call("eval.py", f"runs/{run}", "--batch-size", "8")
        assert (ended.code, ended.err) == (0, "")
        losses[run] = json.loads((trained.runs / run / "report" / "eval.json").read_text())["total"]["loss"]
    assert abs(losses["trained"] - losses["again"]) < 0.02  # one computes in bfloat16

    flags = (
        "--name",
        "further",
        "--train.steps",
        "1",
        "--train.log-every",
        "1",
        "--train.evaluate-every",
        "0",
    )
    ended = trained.call("train.py", TINY, *flags, *SIGMOID, "--init", "Continue(run='runs/again')")
    assert (ended.code, ended.err) == (0, "")
    first = next(line["train/loss"] for line in lines(trained.runs / "further") if "train/loss" in line)
    assert abs(first - losses["trained"]) < 0.3


def test_transformers_agrees_on_a_trained_model(trained: Workshop):
    if not PYTHON.exists():
        pytest.skip("transformers is not installed: python -m benchmarks.peers.environment transformers")
    for quantize in ("", "int4-16"):
        out = f"out/verified{quantize}"
        ended = export(trained, "--out", out, "--quantize", quantize, "--verify", "--python", str(PYTHON))
        assert (ended.code, ended.err) == (0, "")
        assert "verified in transformers: log-probabilities of" in ended.out
        assert "100% of greedy texts are the same" in ended.out
        assert "not verified in vllm, which is not installed: uv run python -m" in ended.out


def test_transformers_measures_the_losses_that_evaluation_does(trained: Workshop):
    if not PYTHON.exists():
        pytest.skip("transformers is not installed: python -m benchmarks.peers.environment transformers")
    export(trained, "--out", "out/served")
    measure = ("moe/compress/served.py", "runs/trained", "out/served", "--python", str(PYTHON))
    ended = trained.call(*measure, "--quantize", "int8", "--tokens", "2000")
    assert (ended.code, ended.err) == (0, "")
    report = trained.runs / "trained" / "report"
    served = json.loads((report / "served-served.json").read_text())["slices"]

    arguments = ("--quantize", "int8", "--tokens", "2000", "--skip-speed")
    assert trained.call("eval.py", "runs/trained", *arguments).code == 0
    found = json.loads((report / "quantized-int8.json").read_text())
    for name, slice_ in {**found["slices"], "all": found["total"]}.items():
        assert served[name]["run"] == pytest.approx(slice_["loss_before"], abs=1e-5)
        assert served[name]["quantized"] == pytest.approx(slice_["loss_after"], abs=1e-5)
        assert served[name]["served"] == pytest.approx(slice_["loss_before"], abs=1e-5)
        assert served[name]["tokens"] == slice_["targets"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs/trained",), "give a run and an export of it"),
        (("runs/trained", "texts"), "texts is neither the folder of a Hugging Face checkpoint nor"),
        (("runs/trained", "out/model.gguf"), "out/model.gguf is neither"),
    ],
)
def test_what_is_no_export_is_not_measured(trained: Workshop, arguments, message):
    ended = trained.call("moe/compress/served.py", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_client_that_is_not_there_is_named(trained: Workshop):
    ended = export(trained, "--out", "out/alone", "--verify", "--python", sys.executable)
    assert ended.code == 2
    for client in ("transformers", "vllm"):
        assert f"not verified in {client}, which is not installed: uv run python -m" in ended.out
    assert "--verify found no client that runs out/alone" in ended.err
    assert ended.err.count("\n") == 1


def test_a_killed_export_leaves_nothing_that_looks_finished(trained: Workshop):
    out = trained.folder / "out" / "killed"
    process = trained.start("export.py", "runs/trained", "--out", "out/killed", "--shard-gb", "0.000001")
    writing = out.with_name("killed.writing")
    while process.poll() is None and not (writing.exists() and list(writing.glob("*.safetensors"))):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()

    ended = export(trained, "--out", "out/killed")
    assert (ended.code, ended.err) == (0, "")
    assert not writing.exists()
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a run directory first"),
        (("runs/trained",), "say where to write"),
        (("runs/nowhere", "--out", "out/x"), "runs/nowhere holds no run"),
        (("runs/trained", "--out", "out/x", "--architecture", "bert"), "--architecture bert: there are"),
        (
            ("runs/trained", "--out", "out/x", "--architecture", "olmoe"),
            "has no model.attention.qk_norm=none",
        ),
        (("runs/trained", "--out", "out/x", "--checkpoint", "7"), "--checkpoint 7: say last, best"),
        (("runs/trained", "--out", "texts"), "texts is there already"),
        (("runs/trained", "--out", "out/x", "--quantize", "int5"), "'int5' is no format"),
        (("runs/trained", "--out", "out/x", "--quantize", "q8_0"), "'q8_0' is no format"),
        (("runs/trained", "--out", "out/x", "--quantize", "int4"), "group_size=32 does not divide the 16"),
        (
            ("runs/trained", "--to", "gguf", "--out", "out/x", "--quantize", "int4"),
            "--quantize int4 is not for --to gguf",
        ),
        (("runs/trained", "--out", "out/x", "--python", "nowhere"), "--python nowhere is no program"),
        (("--from", "hf", "texts", "--out", "runs/x"), "texts holds no checkpoint"),
        (("--from", "onnx", "texts", "--out", "runs/x"), "--from onnx: only hf"),
    ],
)
def test_a_command_that_cannot_work_says_why(trained: Workshop, arguments, message):
    ended = trained.call("export.py", *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (trained.folder / "out" / "x").exists()
    assert not (trained.runs / "x").exists()


def test_a_run_said_to_hold_rounded_weights_must_hold_them(trained: Workshop):
    rounded = trained.runs / "rounded"
    shutil.copytree(trained.runs / "trained", rounded)
    config = json.loads((rounded / "config.json").read_text())
    config["quantization"]["weights"] = "int8"
    (rounded / "config.json").write_text(json.dumps(config))
    ended = trained.call("export.py", "runs/rounded", "--out", "out/rounded")
    assert ended.code == 2
    assert "holds no quantised weights, as its run's config.json says" in ended.err
    assert not (trained.folder / "out" / "rounded").exists()


def test_a_checkpoint_with_another_vocabulary_is_refused(trained: Workshop):
    if not (trained.folder / "out" / "hf").exists():
        export(trained, "--out", "out/hf")
    wrong = shutil.copytree(trained.folder / "out" / "hf", trained.folder / "out" / "wrong")
    tokenizer = json.loads((wrong / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{number}": 256 + number for number in range(1, 200)}
    (wrong / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = trained.call("export.py", "--from", "hf", "out/wrong", "--out", "runs/x")
    assert ended.code == 2
    assert "has 456 tokens and config.json says vocab_size=384" in ended.err

    (wrong / "tokenizer.json").write_text("{")
    assert (
        "no readable tokenizer"
        in trained.call("export.py", "--from", "hf", "out/wrong", "--out", "runs/x").err
    )
    (wrong / "tokenizer.json").unlink()
    assert "is missing" in trained.call("export.py", "--from", "hf", "out/wrong", "--out", "runs/x").err
    assert not (trained.runs / "x").exists()
