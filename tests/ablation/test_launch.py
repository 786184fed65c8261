"""Runs are trained one after the other or submitted; what goes wrong with one does not end the others."""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from invented_sweep import ROUTING, ablation, train_at_once, write_run

from moe.ablation import Run, Slurm, SweepProgress, read_result, run_here, submit
from moe.errors import UNFINISHED, UserError

FLOPS = dict.fromkeys(ROUTING.choices, 1.0)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The handler of SIGTERM and the place of compiled programs."""
    before, cache = signal.getsignal(signal.SIGTERM), jax.config.jax_compilation_cache_dir
    yield
    signal.signal(signal.SIGTERM, before)
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture
def runs(tmp_path) -> tuple[Run, ...]:
    return ablation(axes=(ROUTING,), seeds=(0, 1)).runs(tmp_path)


class Trainer:
    """Trains by writing what training would, unless told otherwise for some run."""

    def __init__(self, **instead: Callable[[Run], object]):
        self.instead = {name.replace("_", "-"): action for name, action in instead.items()}
        self.trained: list[str] = []

    def __call__(self, experiment, directory: Path) -> None:
        title = f"{directory.parent.name}/{directory.name}"
        self.trained.append(title)
        run = Run(directory.parent.name, experiment, directory)
        self.instead.get(title.replace("/", "-"), lambda run: write_run(run, 4.0))(run)


def launch(runs, train, *, leave: Callable[[object], bool] = lambda _: False) -> tuple[bool, list[str]]:
    after: list[str] = []
    progress = SweepProgress([read_result(run) for run in runs], FLOPS)
    ended = run_here(
        runs, train, progress, asked_to_leave=leave, after_each=lambda run: after.append(run.title)
    )
    return ended, after


def fail(error: Exception) -> Callable[[Run], object]:
    def action(_: Run):
        raise error

    return action


def test_every_run_is_trained_once_in_order(runs, capsys):
    train = Trainer()
    assert launch(runs, train) == (True, train.trained)
    assert train.trained == [run.title for run in runs]
    assert capsys.readouterr().out.splitlines()[1] == (
        "run 1 of 6  top-2/seed0  validation loss 4.0000  bits per byte 2.0000"
    )
    assert launch(runs, train) == (True, [])
    assert train.trained == [run.title for run in runs]


def test_finished_runs_are_left_alone_and_unfinished_ones_go_on(runs):
    write_run(runs[1], 4.0)
    runs[2].directory.mkdir(parents=True)
    train = Trainer(top_4_seed0=lambda run: (run.directory.rmdir(), write_run(run, 3.0)))
    launch(runs, train)
    assert train.trained == [run.title for run in runs if run is not runs[1]]
    assert read_result(runs[2]).loss == 3.0


def test_a_run_that_fails_is_recorded_and_the_others_go_on(runs, capsys):
    train = Trainer(
        top_2_seed0=fail(UserError("the loss was not\nfinite")), top_1_seed1=fail(ValueError("a bug"))
    )
    ended, after = launch(runs, train)
    assert ended and after == [run.title for run in runs]
    found = {run.title: read_result(run) for run in runs}
    failed = {title: result.failure for title, result in found.items() if result.status == "failed"}
    assert failed == {"top-2/seed0": "the loss was not finite", "top-1/seed1": "ValueError: a bug"}
    assert "Traceback" in (runs[0].directory / "failure.txt").read_text()
    assert "run 1 of 6  top-2/seed0  failed: the loss was not finite" in capsys.readouterr().out


def test_a_failed_run_is_tried_again(runs):
    launch(runs[:1], Trainer(top_2_seed0=fail(OSError("disk full"))))
    assert read_result(runs[0]).status == "failed"
    for file in runs[0].directory.iterdir():  # train.py would go on beside them
        file.rename(runs[0].directory.parent / file.name)
    runs[0].directory.rmdir()
    launch(runs[:1], Trainer())
    assert read_result(runs[0]).status == "finished"


def test_what_a_run_was_trained_on_is_kept(runs):
    launch(runs[:1], Trainer())
    machine = read_result(runs[0]).machine
    assert set(machine) == {"devices", "commit", "date"}
    assert "cores of" in machine["devices"]


def test_a_run_that_was_asked_to_leave_ends_the_sweep(runs):
    """train() returns before the last step after SIGTERM."""
    train = Trainer(top_1_seed0=lambda run: write_run(run, 4.0, steps=50))
    assert launch(runs, train) == (False, ["top-2/seed0"])
    assert train.trained == ["top-2/seed0", "top-1/seed0"]


def test_sigterm_at_the_last_step_of_a_run_ends_the_sweep_too(runs, capsys):
    """The run is then finished; only the handler that it left behind knows."""

    def handler(*_):
        pass

    def train(experiment, directory):
        signal.signal(signal.SIGTERM, handler)
        write_run(Run(directory.parent.name, experiment, directory), 4.0)

    with pytest.raises(SystemExit) as ended:
        launch(runs, train, leave=lambda left: left is handler)
    assert ended.value.code == UNFINISHED
    assert [run.finished for run in runs] == [True] + [False] * 5
    assert capsys.readouterr().out.splitlines()[-1] == "stopped by SIGTERM; the same command goes on"


def test_sigterm_between_two_runs_ends_the_sweep(runs):
    progress = SweepProgress([read_result(run) for run in runs], FLOPS)
    with pytest.raises(SystemExit) as ended:
        run_here(
            runs,
            Trainer(),
            progress,
            asked_to_leave=lambda _: False,
            after_each=lambda _: os.kill(os.getpid(), signal.SIGTERM),
        )
    assert ended.value.code == UNFINISHED
    assert [run.finished for run in runs] == [True] + [False] * 5


def test_compiled_programs_are_kept_for_all_runs_of_the_sweep(runs, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    launch(runs[:1], Trainer())
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "invented" / "compiled")
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    launch(runs[1:2], Trainer())
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_without_submitit_slurm_is_refused_in_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^--launcher slurm needs submitit: .*uv run --extra slurm"):
        submit(runs, train_at_once, Slurm(), tmp_path / "slurm")


def test_without_a_cluster_slurm_is_refused_in_one_line(runs, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r'^--launcher slurm: Could not detect "srun"'):
        submit(runs, train_at_once, Slurm(), tmp_path / "slurm")


def test_a_job_trains_its_run(runs, tmp_path, monkeypatch):
    """With submitit's local executor: pickled, in a process of its own."""
    pytest.importorskip("submitit")
    tests, root = Path(__file__).parent, Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{tests}")
    write_run(runs[1], 5.0)
    jobs = submit(runs[:2], train_at_once, Slurm(), tmp_path / "jobs", cluster="local")
    assert len(jobs) == 1
    deadline = time.monotonic() + 120
    while not (runs[0].directory / "machine.json").exists():
        assert time.monotonic() < deadline, [f.read_text() for f in (tmp_path / "jobs").rglob("*.err")]
        time.sleep(0.1)
    assert read_result(runs[0]).loss == 4.0


def program(folder: Path, name: str, text: str) -> None:
    """An executable shell script."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(stat.S_IRWXU)


def test_the_batch_file(runs, tmp_path, monkeypatch):
    """What sbatch is given, on a cluster that is only pretended."""
    pytest.importorskip("submitit")
    programs = tmp_path / "programs"
    programs.mkdir()
    program(programs, "srun", "exit 1")
    program(programs, "sbatch", f'cp "$1" {tmp_path}/batch; echo Submitted batch job 77')
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    write_run(runs[0], 4.0)
    slurm = Slurm("research", "lab", gpus=1, cpus=4, memory_gb=32, minutes=90, parallel=2)
    jobs = submit(runs, train_at_once, slurm, tmp_path / "slurm")
    assert jobs == [f"77_{index}" for index in range(5)]
    lines = (tmp_path / "batch").read_text().splitlines()
    for line in (
        "--job-name=invented",
        "--partition=research",
        "--account=lab",
        "--array=0-4%2",
        "--gpus-per-node=1",
        "--cpus-per-task=4",
        "--mem=32GB",
        "--time=90",
        "--nodes=1",
        "--ntasks-per-node=1",
    ):
        assert f"#SBATCH {line}" in lines
    assert f"export PYTHONPATH={Path(__file__).parent}:{Path.cwd()}${{PYTHONPATH:+:$PYTHONPATH}}" in lines
    assert any(line.startswith("srun ") and "-m submitit.core._submit" in line for line in lines)
    assert len(list((tmp_path / "slurm").glob("*.pkl"))) == 5


def test_a_job_that_runs_out_of_time_is_queued_again_as_it_was(runs):
    submitit = pytest.importorskip("submitit")
    from moe.ablation.launch import Job

    job = Job(runs[0], train_at_once)
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is job


@pytest.mark.parametrize("field", ["gpus", "cpus", "memory_gb", "minutes", "parallel"])
def test_a_request_that_no_cluster_understands(field):
    with pytest.raises(UserError, match=rf"^slurm\.{field}=-1 must be at least"):
        Slurm(**{field: -1})
