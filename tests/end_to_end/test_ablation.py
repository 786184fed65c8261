"""A sweep from its command line: trained, stopped, killed and gone on with, reported, and refused."""

import fcntl
import json
import re
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import pytest
from workshop import ROOT, TINY, Workshop, assert_same_run, fingerprint, opened

from moe.errors import UNFINISHED

ABLATION = str(Path(__file__).with_name("tiny_ablation.py"))
TITLES = ["top-2/seed0", "top-1/seed0", "top-2/seed1", "top-1/seed1"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, opened(tmp_path_factory) as workshop:
        patch.syspath_prepend(ROOT)  # ablate.py, called in this process, imports train.py
        yield workshop


@pytest.fixture(scope="module")
def sweep(workshop: Workshop) -> Path:
    """The sweep, finished after a SIGKILL amid its third run and a SIGTERM amid its fourth."""
    sweep = workshop.runs / "sweep"

    killed = workshop.start("ablate.py", ABLATION)
    wait_for_checkpoint(killed, sweep / "top-2" / "seed1")
    killed.kill()
    out, _ = killed.communicate()
    told = [line for line in out.splitlines() if "validation loss" in line]
    assert [line.split("  ")[1] for line in told] == TITLES[:2]
    step = r"^run 2 of 4  top-1/seed0  step 4/8  loss \S+ .*  ETA of the sweep \d:\d\d:\d\d$"
    assert re.search(step, out, re.MULTILINE)
    finished = fingerprint(sweep / "top-1" / "seed0")

    ended = workshop.call("ablate.py", ABLATION, "--report-only")
    assert (ended.code, ended.err) == (0, "")
    assert "2 of 4 runs finished" in ended.out
    assert "2 of 4 runs are finished (1 unfinished, 1 not started)" in markdown(sweep)

    stopped = workshop.start("ablate.py", ABLATION)
    wait_for_checkpoint(stopped, sweep / "top-1" / "seed1")
    stopped.terminate()
    out, err = stopped.communicate(timeout=120)
    assert (stopped.returncode, err) == (UNFINISHED, "")
    assert "run 3 of 4  top-2/seed1  going on after step" in out
    assert re.search(r"stopped by SIGTERM.*; the same command goes on", out.splitlines()[-1])

    ended = workshop.run("ablate.py", ABLATION)
    assert (ended.code, ended.err) == (0, "")
    assert "4 of 4 runs finished; report: runs/sweep/report/index.html" in ended.out
    assert "top-1/seed0" not in ended.out
    assert fingerprint(sweep / "top-1" / "seed0") == finished
    return sweep


def markdown(sweep: Path) -> str:
    """The report of a sweep."""
    return (sweep / "report" / "report.md").read_text()


def wait_for_checkpoint(process: Popen, run: Path) -> None:
    """Wait until a run has saved a step, with others to come."""
    while not list(run.glob("checkpoints/[1-9]")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def commands(sweep: Path) -> list[list[str]]:
    """What the report says trains the first run of each row."""
    return [
        shlex.split(line) for line in re.findall(r"^uv run (train\.py .*)$", markdown(sweep), re.MULTILINE)
    ]


def test_a_run_that_was_killed_is_the_one_that_the_reports_command_trains(workshop: Workshop, sweep: Path):
    """Bit for bit, with another name and the second seed."""
    ended = workshop.run(*commands(sweep)[0], "--seed", "1", "--name", "alone")
    assert (ended.code, ended.err) == (0, "")
    assert_same_run(sweep / "top-2" / "seed1", workshop.runs / "alone")


def test_runs_are_those_of_train_and_eval(workshop: Workshop, sweep: Path):
    assert [path.name for path in (sweep / "top-1" / "seed0" / "checkpoints").iterdir()] == ["8"]
    ended = workshop.call(*commands(sweep)[1])
    assert ended.out.startswith("runs/sweep/top-1/seed0 is complete: all 8 steps are done")
    ended = workshop.call("eval.py", "runs/sweep/top-1/seed0", "--tokens", "512")
    assert (ended.code, ended.err) == (0, "")


def test_the_report_holds_what_the_runs_have_shown(workshop: Workshop, sweep: Path):
    results = json.loads((sweep / "report" / "results.json").read_text())
    assert results["complete"] is True
    for title in TITLES:
        row, seed = title.split("/seed")
        last = json.loads((sweep / title / "metrics.jsonl").read_text().splitlines()[-1])
        run = results["rows"][row]["runs"][seed]
        assert last["step"] == 8
        assert (run["loss"], run["bits_per_byte"]) == (
            last["validation/loss"],
            last["validation/bits_per_byte"],
        )
        assert run["tokens_per_second"] > 0
    assert results["rows"]["top-1"]["experts_per_token"]["mean"] == 1.0
    page = (sweep / "report" / "index.html").read_text()
    assert page.count("<table>") == 2 and page.count("data:image/png;base64,") == 5


def test_a_finished_sweep_trains_nothing(workshop: Workshop, sweep: Path):
    before = {title: fingerprint(sweep / title) for title in TITLES}
    for extra in ((), ("--report-only",), ("--dry-run",), ("--launcher", "slurm")):
        ended = workshop.call("ablate.py", ABLATION, *extra)
        assert (ended.code, ended.err) == (0, "")
    assert {title: fingerprint(sweep / title) for title in TITLES} == before


def test_a_dry_run_leaves_no_trace(workshop: Workshop, sweep: Path):
    before = fingerprint(workshop.runs)
    ended = workshop.call("ablate.py", ABLATION, "--name", "dry", "--dry-run", "--only", "top-1")
    assert (ended.code, ended.err) == (0, "")
    assert "| top-1 |" in ended.out and "top-2" not in ended.out
    assert "2 runs, 0 finished; about" in ended.out
    assert fingerprint(workshop.runs) == before


def test_runs_that_fail_are_told_by_the_exit_code(workshop: Workshop):
    """It is 1, however many they are: 2 is for bad input."""
    with ExitStack() as stack:
        for title in TITLES[:2]:
            run = workshop.runs / "failing" / title
            run.mkdir(parents=True)
            lock = stack.enter_context((run / ".lock").open("w"))  # as if another process trained in it
            fcntl.flock(lock, fcntl.LOCK_EX)
        ended = workshop.call("ablate.py", ABLATION, "--name", "failing", "--seeds", "0")
    assert (ended.code, ended.err) == (1, "2 of 2 runs failed; the same command tries them again\n")
    report = markdown(workshop.runs / "failing")
    assert "0 of 2 runs are finished (2 failed)" in report
    for title in TITLES[:2]:
        assert f"failed: another process is training in runs/failing/{title}" in ended.out
        assert f"- `{title}`: `another process is training in" in report


CHANGED = """
from dataclasses import replace
from end_to_end.tiny_ablation import config as sweep
from moe.ablation import Axis
config = replace(sweep, {changes})
"""

# What the file changes in the sweep, more arguments, and what is said.
REFUSED = {
    "an unknown field": (
        'axes=(Axis("routing", {"top-2": {"model.moe.rooting": 2}}),)',
        (),
        "axis 'routing': 'top-2': unknown field 'model.moe.rooting' (did you mean 'model.moe.routing'?)",
    ),
    "a baseline that is no row": (
        'baseline={"routing": "top2"}',
        (),
        "baseline: axis 'routing' has no choice 'top2' (did you mean 'top-2'?)",
    ),
    "a label that stands twice": (
        'axes=(Axis("routing", {"top-2": {}, "top-2": {"model.layers": "D"}}),)',
        (),
        "changed.py, line 4: 'top-2' stands twice; give it another name",
    ),
    "no seeds": ("seeds=()", (), "seeds is empty"),
    "no seeds on the command line": ("", ("--seeds", "()"), "seeds is empty"),
    "choices that cannot combine": (
        'axes=(Axis("experts", {"8": {}, "1": {"model.moe.num_experts": 1}}),), baseline={}',
        (),
        "1 is not possible: model.moe: model.moe.routing.k=2 must lie between 1 and model.moe.num_experts=1",
    ),
    "runs of another config": (
        "",
        ("--base.train.steps", "9"),
        "runs/sweep/top-2/seed0 holds a run of another config (train.steps: 8 in the run, 9 here)",
    ),
    "a report on runs of another config": (
        "",
        ("--report-only", "--base.train.steps", "9"),
        "holds a run of another config",
    ),
    "rows that are not there": (
        "",
        ("--only", "top-3*"),
        "--only top-3* fits no row; there are top-2, top-1",
    ),
    "an unknown flag": ("", ("--base.train.step", "9"), "did you mean --base.train.steps?"),
    "an unknown launcher": ("", ("--launcher", "pbs"), "--launcher: expected one of local, slurm, got 'pbs'"),
    "a share that is none": ("", ("--utilisation", "2"), "utilisation=2.0 must lie in (0, 1]"),
    "a batch that the devices cannot share": (
        'name="new"',
        ("--base.train.batch-size", "12"),
        "is 12 sequences, which 8 devices cannot share",
    ),
    "missing text": (
        'name="new"',
        ("--base.data.corpus.train", "nowhere"),
        "data.corpus.train: 'nowhere' finds no",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_and_trains_nothing(case: str, workshop: Workshop, sweep: Path):
    changes, arguments, message = REFUSED[case]
    (workshop.folder / "changed.py").write_text(CHANGED.lstrip().format(changes=changes))
    before = fingerprint(workshop.runs)
    ended = workshop.call("ablate.py", "changed.py", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert message in ended.err
    assert fingerprint(workshop.runs) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give an ablation first"),
        (("--dry-run",), "give an ablation first"),
        (("nowhere.py",), "nowhere.py: no such config file"),
        ((TINY,), "`config` is of type Experiment, expected an instance of Ablation"),
    ],
)
def test_without_an_ablation_there_is_nothing_to_do(workshop: Workshop, arguments, message):
    ended = workshop.call("ablate.py", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err and ended.err.count("\n") == 1


def test_help_lists_the_fields_of_the_sweep_and_of_its_base(workshop: Workshop):
    ended = workshop.call("ablate.py", ABLATION, "--help")
    assert ended.code == 0
    for flag in ("--launcher", "--dry-run", "--report-only", "--only", "--seeds", "--margin", "--slurm.gpus"):
        assert flag in ended.out
    assert "--base.train.steps" in ended.out and "--base.model.moe.routing.k" in ended.out
