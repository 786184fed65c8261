"""A sparse run that starts from a dense one, by train.py."""

import shutil

from workshop import TINY, Workshop, lines


def test_a_run_starts_from_a_dense_one_and_then_stands_alone(workshop: Workshop):
    flags = ("--train.average-decay", "0", "--train.log-every", "1", "--train.evaluate-every", "0")
    dense = ("--name", "dense", "--model.layers", "DD", "--model.dense-width", "16", "--train.steps", "24")
    assert workshop.call("train.py", TINY, *dense, *flags).code == 0

    upcycle = ("--name", "upcycled", "--init", "Upcycle(run='runs/dense')", "--train.steps", "4", *flags)
    ended = workshop.call("train.py", TINY, *upcycle)
    assert (ended.code, ended.err) == (0, "")
    told = {
        run: [line["train/loss"] for line in lines(workshop.runs / run) if "train/loss" in line]
        for run in ("dense", "upcycled")
    }
    first, last = told["dense"][0], told["dense"][-1]
    assert abs(told["upcycled"][0] - last) < 0.2 * (first - last)

    # Taking a run up again does not read the other one.
    shutil.rmtree(workshop.runs / "dense")
    ended = workshop.call("train.py", TINY, *upcycle)
    assert ended.code == 0
    assert "is complete" in ended.out


def test_a_starting_point_that_is_missing_leaves_no_run_behind(workshop: Workshop):
    ended = workshop.call("train.py", TINY, "--name", "lost", "--init", "Upcycle(run='runs/nowhere')")
    assert ended.code == 2
    assert ended.err.startswith("error: runs/nowhere holds no run")
    assert not (workshop.runs / "lost").exists()


def test_a_model_that_looks_ahead_says_so(workshop: Workshop):
    flags = ("--model.layers", "d", "--model.depth-capacity", "0.25", "--train.steps", "1")
    ended = workshop.call("train.py", TINY, "--name", "depth", *flags)
    assert ended.code == 0
    note = "note: model.layers='d' lets tokens see later ones: "
    assert ended.err == f"{note}the model cannot generate\n"
    ended = workshop.call("eval.py", "runs/depth")
    assert ended.code == 0
    assert ended.err == f"{note}the losses may be too good\n"
