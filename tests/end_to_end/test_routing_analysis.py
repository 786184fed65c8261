"""A run whose routing is analysed, traced, and replayed."""

import json
from pathlib import Path

import numpy as np
import pytest
from workshop import TINY, Workshop, fingerprint

from moe.config import override, to_json
from moe.data import prepare, train_batches
from moe.routing.trace import sequence_hashes, trace_info
from moe.training.run_directory import read_experiment

EXPERTS, LAYERS, LENGTH = 8, 2, 32


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Path:
    """A run of 12 steps that keeps checkpoints 4, 8 and 12."""
    often = ("--checkpoints.keep-last", "5", "--train.evaluate-every", "0")
    assert workshop.call("train.py", TINY, "--train.steps", "12", *often).code == 0
    return workshop.runs / "tiny"


@pytest.fixture(scope="module")
def trace(workshop: Workshop, run: Path) -> Path:
    """Who went where on all its validation data."""
    ended = workshop.call("eval.py", "runs/tiny", "--trace", "trace.npz")
    assert (ended.code, ended.err) == (0, "")
    assert "written: trace.npz" in ended.out
    return workshop.folder / "trace.npz"


def evaluated(workshop: Workshop, *arguments: str, looks_ahead: bool = False) -> dict:
    ended = workshop.call("eval.py", "runs/tiny", *arguments)
    assert (ended.code, ended.err.count("\n")) == (0, looks_ahead)
    assert ("lets tokens see later ones: the losses may be too good" in ended.err) == looks_ahead
    return json.loads((workshop.runs / "tiny" / "report" / "eval.json").read_text())


def test_the_routing_report(workshop: Workshop, run: Path):
    load = evaluated(workshop)["total"]["load"]
    before = {name: d for name, d in fingerprint(run).items() if not name.startswith("report/routing")}
    ended = workshop.call("eval.py", "runs/tiny", "--routing")
    assert (ended.code, ended.err) == (0, "")
    after = fingerprint(run)
    written = {run / name for name in after.keys() - before.keys()}
    assert {name: after[name] for name in before} == before, "nothing else has changed"
    assert {Path(line.strip()) for line in ended.out.partition("written:")[2].split()} == {
        path.relative_to(workshop.folder) for path in written
    }

    found = json.loads((run / "report" / "routing.json").read_text())
    np.testing.assert_allclose(found["total_load"], load, atol=1e-5)
    assert (found["step"], found["experts_per_token"]) == (12, 2)
    assert list(found["saturation"]) == ["4", "8"]
    assert np.shape(found["coactivation"]) == (LAYERS, EXPERTS, EXPERTS)
    # Each of a token's two experts is active together with exactly one other.
    np.testing.assert_allclose(np.sum(found["coactivation"], axis=-1), 2, atol=1e-5)
    # Nearer checkpoints agree better, and any better than chance.
    early, late = (np.mean(found["saturation"][step]) for step in ("4", "8"))
    assert 2 / EXPERTS < early < late <= 1
    assert set(found["entropy"]) == {"prose", "code"}
    page = (run / "report" / "routing.html").read_text()
    assert "<code>" in page and "saturation.png" in page


def test_without_an_earlier_checkpoint_saturation_is_left_out(workshop: Workshop, run: Path):
    ended = workshop.call("eval.py", "runs/tiny", "--routing", "--checkpoint", "4", "--tokens", "640")
    assert (ended.code, ended.err) == (0, "")
    assert "router saturation is left out" in ended.out
    found = json.loads((run / "report" / "routing.json").read_text())
    assert (found["step"], found["saturation"]) == (4, {})


def test_a_damaged_checkpoint_is_left_out(workshop: Workshop, run: Path):
    copy = workshop.copy("tiny", "damaged")
    contents = copy / "checkpoints" / "4" / "contents.json"
    contents.write_text(contents.read_text().replace('"step"', '"stop"'))
    ended = workshop.call("eval.py", "runs/damaged", "--routing", "--tokens", "640")
    assert (ended.code, ended.err) == (0, "checkpoint 4 is damaged (contents.json has changed): left out\n")
    assert list(json.loads((copy / "report" / "routing.json").read_text())["saturation"]) == ["8"]


def test_a_trace(workshop: Workshop, run: Path, trace: Path, monkeypatch):
    monkeypatch.chdir(workshop.folder)
    info, experiment = trace_info(str(trace)), read_experiment(run)
    assert (info.num_experts, info.layers, info.sequence_length, info.experts_per_token) == (8, 2, 32, 2)
    assert (info.metadata["run"], info.metadata["step"], info.metadata["data"]) == ("tiny", 12, "validation")
    assert info.metadata["strategy"]["k"] == 2
    assert info.metadata["config"] == json.loads((run / "config.json").read_text())

    dataset = prepare(experiment.data)
    sequences = []
    for name in dataset.slices:
        tokens = dataset.tokens(name, "validation").astype(np.int64)
        rows = -(-(len(tokens) - 1) // LENGTH)
        padded = np.full(rows * LENGTH, dataset.end_of_text)
        padded[: len(tokens)] = tokens[: rows * LENGTH]
        sequences.append(padded.reshape(rows, LENGTH))
    with np.load(trace) as arrays:
        assert set(arrays["hash"].tolist()) == set(sequence_hashes(np.concatenate(sequences)).tolist())
        assert arrays["expert"].shape == (len(arrays["hash"]), LAYERS, LENGTH, 2)
        somewhere = arrays["expert"] < EXPERTS
        tokens = somewhere.all(-1)
        np.testing.assert_array_equal(somewhere.any(-1), tokens)
        assert 0.9 < tokens.mean() < 1  # the rest is padding
        np.testing.assert_allclose(arrays["combine_weight"][tokens].sum(-1), 1, rtol=1e-5)


def test_the_layout_does_not_change_a_trace(workshop: Workshop, trace: Path):
    ended = workshop.call(
        "eval.py", "runs/tiny", "--trace", "split.npz", "--expert", "4", "--batch-size", "24"
    )
    assert (ended.code, ended.err) == (0, "")
    with np.load(trace) as one, np.load(workshop.folder / "split.npz") as other:
        np.testing.assert_array_equal(one["hash"], other["hash"])
        # Rounding may decide a route or two.
        assert (one["expert"] == other["expert"]).mean() > 0.999


def test_replaying_its_own_trace_changes_nothing(workshop: Workshop, trace: Path):
    plain = evaluated(workshop)
    recorded, recomputed = (
        evaluated(workshop, "--strategy", *arguments, looks_ahead=True)
        for arguments in (('Replay("trace.npz", "recorded")',), ('Replay("trace.npz")', "--batch-size", "24"))
    )
    for name, result in {**plain["slices"], "total": plain["total"]}.items():
        again = {**recorded["slices"], "total": recorded["total"]}[name]
        assert again == result | {"replayed_fraction": 1.0}
        again = {**recomputed["slices"], "total": recomputed["total"]}[name]
        assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)
        assert again["load"] == result["load"]


def test_a_run_can_be_evaluated_by_another_strategy(workshop: Workshop, run: Path):
    plain, single = evaluated(workshop), evaluated(workshop, "--strategy", "TopK(k=1)")
    assert single["compute"]["active_params"] < plain["compute"]["active_params"]
    assert single["total"]["loss"] > plain["total"]["loss"]


def test_training_by_the_trace_of_another_run(workshop: Workshop, run: Path, monkeypatch):
    """The traced sequences are those of its first steps; the run that replays them can be evaluated."""
    monkeypatch.chdir(workshop.folder)
    sequences = 3 * 16  # three steps
    arguments = ("--trace-data", "train", "--tokens", str(sequences * LENGTH))
    ended = workshop.call("eval.py", "runs/tiny", "--trace", "train.npz", *arguments)
    assert (ended.code, ended.err) == (0, "")
    experiment = read_experiment(run)
    dataset = prepare(experiment.data)
    batches = train_batches(dataset, batch_size=16, sequence_length=LENGTH, seed=experiment.seed)
    seen = np.concatenate([next(batches)["tokens"][:, :-1] for _ in range(3)])
    with np.load("train.npz") as arrays:
        assert set(arrays["hash"].tolist()) == set(sequence_hashes(seen).tolist())

    replayed = ("train.py", TINY, "--name", "replayed", "--model.moe.routing", 'Replay("train.npz")')
    steps = ("--train.steps", "3", "--checkpoints.every", "1", "--train.evaluate-every", "0")
    ended = workshop.call(*replayed, *steps)
    assert ended.code == 0
    lines = [
        json.loads(line) for line in (workshop.runs / "replayed" / "metrics.jsonl").read_text().splitlines()
    ]
    told = [line["routing/replayed_fraction"] for line in lines if "routing/replayed_fraction" in line]
    assert told == [1.0]
    assert workshop.call("eval.py", "runs/replayed", "--tokens", "64").code == 0


OTHERS = {
    "dense": ("--model.layers", "DD"),
    "depth": ("--model.layers", "Mm"),
    "soft": ("--model.moe.routing", "SoftMoE()", "--model.moe.balance", "()"),
}

NEW = ("train.py", TINY, "--name", "new")

REFUSED = {
    "a dense model": (("eval.py", "runs/dense", "--routing"), "model.layers='DD' is a dense model"),
    "a trace of a dense model": (("eval.py", "runs/dense", "--trace", "t.npz"), "is a dense model"),
    "layers that some tokens enter": (("eval.py", "runs/depth", "--routing"), "layers that only some tokens"),
    "a strategy without routes": (("eval.py", "runs/soft", "--routing"), "sends no token to single experts"),
    "a trace in no folder": (
        ("eval.py", "runs/tiny", "--trace", "nowhere/t.npz"),
        "--trace nowhere/t.npz: No such file or directory; give a file in a folder",
    ),
    "a trace in a folder's place": (
        ("eval.py", "runs/tiny", "--trace", "texts"),
        "--trace texts: Is a directory",
    ),
    "no file for the trace": (("eval.py", "runs/tiny", "--trace"), "--trace: missing value"),
    "other data": (
        ("eval.py", "runs/tiny", "--trace", "t.npz", "--trace-data", "test"),
        "--trace-data: expected one of validation, train, got 'test'",
    ),
    "endless data": (
        ("eval.py", "runs/tiny", "--trace", "t.npz", "--trace-data", "train"),
        "say how much of it, like --tokens",
    ),
    "a trace that is not there": (
        (*NEW, "--model.moe.routing", 'Replay("none.npz")'),
        "model.moe.routing.trace='none.npz': No such file or directory",
    ),
    "a trace of other experts": (
        (*NEW, "--model.moe.routing", 'Replay("trace.npz")', "--model.moe.num-experts", "16"),
        "model.moe.routing.trace='trace.npz' is of 8 experts, model.moe of 16",
    ),
    "a trace of other layers": (
        (*NEW, "--model.moe.routing", 'Replay("trace.npz")', "--model.layers", "MMM"),
        "model.moe.routing.trace='trace.npz' is of 2 MoE layers, model.layers has 3",
    ),
    "a trace of other sequences": (
        (*NEW, "--model.moe.routing", 'Replay("trace.npz")', "--data.sequence-length", "16"),
        "model.moe.routing.trace='trace.npz' is of sequences of 32 tokens, a group has 16",
    ),
}


@pytest.fixture(scope="module")
def others(workshop: Workshop, run: Path) -> None:
    """Run directories in whose models there is nothing to look at, which shows before anything is read."""
    for name, flags in OTHERS.items():
        experiment = override(read_experiment(run), flags, prog="", description="")
        (workshop.runs / name).mkdir()
        (workshop.runs / name / "config.json").write_text(to_json(experiment))


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line(case: str, workshop: Workshop, run: Path, trace: Path, others: None):
    before = fingerprint(workshop.runs)
    command, message = REFUSED[case]
    ended = workshop.call(*command)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.endswith("\n") and ended.err.count("\n") == 1
    assert message in ended.err
    assert fingerprint(workshop.runs) == before
    assert not list(workshop.folder.glob("**/t.npz*"))
