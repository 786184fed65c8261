"""What eval.py measures, against a recomputation and against what the training run said."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from workshop import TINY, Workshop, checkpoint, fingerprint, lines

from moe.data import prepare
from moe.errors import UNFINISHED
from moe.mesh import MeshConfig, make_mesh
from moe.nn import structure
from moe.training.run_directory import read_experiment


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Path:
    """A run whose best checkpoint is not its last: the learning rate grows until the loss does."""
    growing = ("--optimizer.learning-rate", "0.02", "--optimizer.schedule", "Linear(warmup=1, final=30.0)")
    command = ("train.py", TINY, "--train.steps", "12", "--train.evaluate-every", "4", *growing)
    assert workshop.call(*command).code == 0
    return workshop.runs / "tiny"


def measured(workshop: Workshop, *arguments: str) -> dict:
    ended = workshop.call("eval.py", "runs/tiny", *arguments)
    assert (ended.code, ended.err) == (0, "")
    return json.loads((workshop.runs / "tiny" / "report" / "eval.json").read_text())


def validation(run: Path) -> dict[int, dict[str, float]]:
    """What training said of its evaluations, by step."""
    return {line["step"]: line for line in lines(run) if "validation/loss" in line}


def test_losses_are_those_of_a_recomputation(workshop: Workshop, run: Path, monkeypatch):
    monkeypatch.chdir(workshop.folder)
    report, experiment = measured(workshop), read_experiment(run)
    dataset, state = prepare(experiment.data), checkpoint(run, 12).state
    size = experiment.data.sequence_length
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = nnx.merge(structure(experiment.model)[0], state.average, state.controllers)
        for name, result in report["slices"].items():
            tokens = dataset.tokens(name, "validation").astype(np.int32)
            # The first token is no target, and the end of the last window is padding after the last one.
            rows = -(-(len(tokens) - 1) // size)
            targets = np.pad(tokens[1:], (0, rows * size - len(tokens) + 1)).reshape(rows, size)
            inputs = np.pad(tokens[:-1], (0, rows * size - len(tokens) + 1)).reshape(rows, size)
            hidden, _ = jax.jit(lambda model, x: model(x))(model, inputs)
            logits = np.asarray(model.logits(hidden), np.float64)
            nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
            nll = nll.reshape(-1)[: len(tokens) - 1].sum()
            characters = int((tokens[1:] < 256).sum())  # one byte each; the rest are ends of text
            assert result["targets"] == len(tokens) - 1
            assert result["text_bytes"] == characters
            assert result["loss"] == pytest.approx(nll / (len(tokens) - 1), rel=1e-4)
            assert result["bits_per_byte"] == pytest.approx(nll / np.log(2) / characters, rel=1e-4)


def test_the_last_and_the_best_checkpoint_have_the_losses_that_training_told(workshop: Workshop, run: Path):
    told, limit = validation(run), ("--tokens", str(read_experiment(run).train.evaluate_tokens))
    best = min(told, key=lambda step: told[step]["validation/loss"])
    assert best != 12
    for which, tokens, step in (("last", (), 12), ("best", limit, best), ("8", limit, 8)):
        report = measured(workshop, "--checkpoint", which, *tokens)
        assert report["step"] == step
        assert report["tokens_trained"] == step * 16 * 32
        results = {**{f"/{name}": result for name, result in report["slices"].items()}, "": report["total"]}
        for name, result in results.items():
            for kind in ("loss", "bits_per_byte"):
                assert result[kind] == pytest.approx(told[step][f"validation/{kind}{name}"], rel=1e-6)


def test_one_device_measures_what_eight_do(workshop: Workshop, run: Path):
    eight = measured(workshop)
    ended = workshop.run("eval.py", "runs/tiny", devices=1)
    assert (ended.code, ended.err) == (0, "")
    one = json.loads((run / "report" / "eval.json").read_text())
    assert one["compute"] == eight["compute"]
    for name in one["slices"]:
        for kind in ("loss", "bits_per_byte"):
            assert one["slices"][name][kind] == pytest.approx(eight["slices"][name][kind], rel=1e-5)
        assert one["slices"][name]["targets"] == eight["slices"][name]["targets"]


def test_tokens_limit_each_slice(workshop: Workshop, run: Path):
    for result in measured(workshop, "--tokens", "320")["slices"].values():
        assert 9 * 32 < result["targets"] <= 320  # ten windows, of which the last is not full


def test_tensorboard_shows_the_report(workshop: Workshop, run: Path):
    report = measured(workshop)
    [*_, newest] = sorted(
        (run / "report" / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns
    )
    events = EventAccumulator(str(newest)).Reload()
    for name, result in {**report["slices"], "total": report["total"]}.items():
        [event] = events.Scalars(f"eval/loss/{name}")
        assert (event.step, event.value) == (12, pytest.approx(result["loss"]))
    assert events.Scalars("compute/total_params")[0].value == report["compute"]["total_params"]
    assert events.Images("eval/load")


def test_evaluating_leaves_the_run_as_it_is(workshop: Workshop, run: Path):
    def besides_report() -> dict[str, str]:
        return {name: digest for name, digest in fingerprint(run).items() if not name.startswith("report/")}

    before = besides_report()
    measured(workshop)
    assert besides_report() == before


def test_a_dense_model_has_no_load(workshop: Workshop):
    command = ("--name", "dense", "--model.layers", "DD", "--model.dense-width", "32", "--train.steps", "2")
    assert workshop.call("train.py", TINY, *command).code == 0
    ended = workshop.call("eval.py", "runs/dense")
    assert (ended.code, ended.err) == (0, "")
    assert "expert load" not in ended.out
    report = json.loads((workshop.runs / "dense" / "report" / "eval.json").read_text())
    assert report["total"]["load"] == []
    assert report["compute"]["active_params"] == report["compute"]["total_params"]
    told = validation(workshop.runs / "dense")[2]
    assert report["total"]["loss"] == pytest.approx(told["validation/loss"], rel=1e-6)


def test_a_run_can_be_evaluated_while_it_trains(workshop: Workshop):
    often = ("--checkpoints.every", "25", "--train.evaluate-every", "0", "--train.steps", "100000")
    training = workshop.start("train.py", TINY, "--name", "going", *often, devices=8)
    folder = workshop.runs / "going" / "checkpoints"
    while not (folder.exists() and any(path.name.isdecimal() for path in folder.iterdir())):
        assert training.poll() is None, training.communicate()
        time.sleep(0.05)
    evaluated = workshop.call("eval.py", "runs/going", "--tokens", "64")
    assert training.poll() is None
    training.terminate()
    out, err = training.communicate(timeout=300)
    assert (evaluated.code, evaluated.err) == (0, "")
    assert (training.returncode, err) == (UNFINISHED, "")
    assert "stopped by SIGTERM" in out


def test_a_run_is_asked_tasks_and_timed(workshop: Workshop, run: Path):
    """Both leave their reports beside the others'."""
    pytest.importorskip("lm_eval")
    (workshop.folder / "cats.jsonl").write_text('{"thing": "the cat sat on a", "answer": 0}\n')
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "cats.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{thing}}",
        "doc_to_choice": ["mat", "qqq"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (workshop.folder / "cats.json").write_text(json.dumps(task))
    ended = workshop.call("eval.py", "runs/tiny", "--tasks", "cats.json", "--quantize", "int8")
    assert ended.code == 0, ended.err
    found = json.loads((run / "report" / "tasks.json").read_text())
    assert found["tasks"]["cats"]["acc,none"] == 1.0
    assert (found["step"], found["weights"]) == (12, "int8")

    timed = ("--skip-serving", "--calls", "1", "--profiled", "0")
    assert workshop.call("eval.py", "runs/tiny", "--speed", *timed).code == 0
    speed = json.loads((run / "report" / "speed.json").read_text())
    (step,) = speed["workloads"]
    assert step["name"] == "train step" and step["input_seconds"] > 0


def test_a_run_beside_itself_before_quantisation_and_at_an_earlier_step(workshop: Workshop, run: Path):
    few = ("--tokens", "1024", "--batch-size", "16")
    quantized = ("--baseline", "runs/tiny", "--quantize", "int8")
    ended = workshop.call("eval.py", "runs/tiny", *quantized, *few)
    assert ended.code == 0, ended.err
    found = json.loads((run / "report" / "compare-tiny-int8.json").read_text())
    assert [side["name"] for side in found["sides"]] == ["tiny", "tiny in int8"]
    assert set(found["slices"]) == {"prose", "code", "all"}
    assert all(0 < abs(q["difference"]) < 0.05 for q in found["slices"].values())
    ratios = {row["name"]: row["ratio"] for row in found["costs"]}
    assert ratios["parameters"] == 1.0
    assert 0.25 < ratios["bytes of the weights"] < 0.5
    assert [row["name"] for row in found["speed"]] == ["prefill", "decode 1", "decode 8"]
    assert (run / "report" / "compare-tiny-int8.html").read_text().startswith("<!doctype html>")

    earlier = ("--baseline", "runs/tiny", "--baseline-checkpoint", "8", "--skip-speed")
    assert workshop.call("eval.py", "runs/tiny", *earlier, *few).code == 0
    found = json.loads((run / "report" / "compare-tiny.json").read_text())
    assert [side["step"] for side in found["sides"]] == [8, 12]
    losses = validation(run)
    told = found["slices"]["all"]
    # Training evaluated on more of the same data; the loss has grown since.
    assert told["verdict"] == "worse" and losses[8]["validation/loss"] < losses[12]["validation/loss"]
    assert found["regressions"][0].startswith("bits per byte of")


def test_a_baseline_that_is_no_run_is_refused(workshop: Workshop, run: Path):
    ended = workshop.call("eval.py", "runs/tiny", "--baseline", "texts")
    assert ended.code == 2 and "texts holds no run" in ended.err
