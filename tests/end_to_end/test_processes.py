"""Two processes, as if on two machines: they train, lose one another, go on elsewhere, evaluate."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from workshop import ROOT, TINY, Ended, Workshop, checkpoint, lines

import moe.processes
from moe.config import to_json
from moe.errors import UNFINISHED, UserError
from moe.experiment import Experiment
from moe.named_arrays import named_leaves
from moe.training import run_directory

TRAIN = ["train.py", TINY, "--name", "run", "--model.layers", "M", "--train.accumulation", "1"]
TRAIN += ["--train.evaluate_every", "0", "--mesh.expert", "8"]
# Experts over all devices: XLA on CPUs starts independent collectives in the order in which they become
# ready, another one in each process: over several groups of devices the processes would wait for one another.


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(workshop: Workshop, *command: str, devices: int) -> list[subprocess.Popen]:
    """The same command in two processes, which the usual variables join."""
    address = f"localhost:{free_port()}"
    return [
        workshop.start(
            *command,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]


def ended(processes: list[subprocess.Popen]) -> list[Ended]:
    """How they ended; Gloo, which carries data between simulated devices, greets on standard output."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        told = "".join(line for line in out.splitlines(keepends=True) if "[Gloo]" not in line)
        found.append(Ended(process.returncode, told, err))
    return found


def wait_for_another_checkpoint(run: Path, process: subprocess.Popen) -> None:
    def complete() -> set[str]:
        folder = run / "checkpoints"
        return {path.name for path in folder.iterdir() if path.name.isdecimal()} if folder.exists() else set()

    before = complete()
    while not complete() - before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def lost(workshop: Workshop) -> list[Ended]:
    """A run of 2 x 4 devices, whose second process is killed after the first checkpoint."""
    processes = start(workshop, *TRAIN, devices=4)
    wait_for_another_checkpoint(workshop.runs / "run", processes[0])
    processes[1].kill()
    return ended(processes)


def test_a_lost_process_ends_the_others_at_once_and_is_named(lost: list[Ended]):
    first, killed = lost
    assert (first.code, killed.code) == (UNFINISHED, -signal.SIGKILL)
    assert re.fullmatch(
        r"error: process 1 of 2 on \S+ is gone, .*; the same command goes on from the newest checkpoint, .*",
        first.err.splitlines()[-1],
    )
    assert "8 x cpu in 2 processes" in first.out
    assert killed.out == ""  # only the first one tells


SRUN = """#!/usr/bin/env bash
# Starts the tasks on this machine, as srun does on nodes.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID
  "$@" >out.$SLURM_PROCID 2>&1 &
  echo $! >pid.$SLURM_PROCID
done
code=0
for task in 0 1; do
  ended=0
  wait "$(cat pid.$task)" || ended=$?
  if ((ended > code)); then code=$ended; fi
done
exit $code
"""
SCANCEL = '#!/usr/bin/env bash\necho "$*" >scancel\nkill -TERM "$(cat pid.1)"\n'
SCONTROL = '#!/usr/bin/env bash\necho "$*" >scontrol\n'


@pytest.fixture(scope="module")
def stopped(workshop: Workshop, lost) -> Ended:
    """The same run as a SLURM job, whose time is up after a step."""
    programs = workshop.folder / "slurm"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (workshop.folder / ".venv").symlink_to(sys.prefix)
    job = workshop.start_program(
        "bash",
        str(ROOT / "launch" / "slurm.sbatch"),
        str(ROOT / TRAIN[0]),
        *TRAIN[1:],
        devices=4,
        PATH=f"{programs}:{os.environ['PATH']}",
        SLURM_JOB_ID="17",
        SLURM_NTASKS="2",
        SLURM_CPUS_ON_NODE="1",
        JAX_COORDINATOR_PORT=str(free_port()),
    )
    wait_for_another_checkpoint(workshop.runs / "run", job)
    job.send_signal(signal.SIGUSR1)
    return ended([job])[0]


def test_a_slurm_job_whose_time_is_up_saves_and_queues_itself_again(workshop: Workshop, stopped: Ended):
    assert stopped == (UNFINISHED, f"ended with exit code {UNFINISHED}: queued again\n", "")
    assert (workshop.folder / "scancel").read_text() == "--signal=TERM 17\n"
    assert (workshop.folder / "scontrol").read_text() == "requeue 17\n"
    told = (workshop.folder / "out.0").read_text()
    assert "8 x cpu in 2 processes" in told
    assert "going on after step" in told
    # Only the second process was asked; the first one stopped with it.
    at = re.search(r"stopped by SIGTERM after step (\d+) and saved", told)
    assert at
    assert (workshop.runs / "run" / "checkpoints" / at[1]).exists()


@pytest.fixture(scope="module")
def run(workshop: Workshop, stopped) -> Path:
    """The same run, brought to its end in one process with 8 devices."""
    ended = workshop.call(*TRAIN)
    assert (ended.code, ended.err) == (0, "")
    assert "going on after step" in ended.out
    return workshop.runs / "run"


def test_the_run_is_that_of_one_process(workshop: Workshop, run: Path):
    whole = workshop.runs / "whole"
    assert workshop.call(*TRAIN, "--name", "whole").code == 0
    logged, expected = lines(run), lines(whole)
    assert len(logged) == len(expected)
    for line, want in zip(logged, expected, strict=True):
        assert line.keys() == want.keys()
        for name in want:
            if "loss" in name:
                assert line[name] == pytest.approx(want[name], rel=1e-5), (name, want["step"])
    (_, state, position), (_, wanted, wanted_position) = checkpoint(run, 24), checkpoint(whole, 24)
    assert position["batches"] == wanted_position["batches"]
    wanted = named_leaves(wanted)
    for name, leaf in named_leaves(state).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_two_processes_evaluate_to_the_same_loss(workshop: Workshop, run: Path):
    def total() -> dict:
        return json.loads((run / "report" / "eval.json").read_text())["total"]

    assert workshop.call("eval.py", "runs/run").code == 0
    alone = total()
    (run / "report" / "eval.json").unlink()
    first, second = ended(start(workshop, "eval.py", "runs/run", devices=4))
    assert (first.code, first.err, second) == (0, "", Ended(0, "", ""))
    assert "expert load" in first.out
    assert total()["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert total()["targets"] == alone["targets"]


def test_processes_with_different_configs_are_refused(monkeypatch):
    other = replace(Experiment(), seed=3)
    monkeypatch.setattr(run_directory, "first_decides", lambda decide: to_json(other))
    with pytest.raises(UserError, match=r"^process 0 of 1 on \S+ has another config .*seed: 3 .*, 0 here"):
        run_directory.check_processes(Experiment())


def test_processes_that_read_different_data_are_refused(workshop: Workshop, monkeypatch):
    monkeypatch.setattr(moe.processes, "first_decides", lambda decide: "0123")
    ended = workshop.call(*TRAIN, "--name", "elsewhere")
    assert (ended.code, ended.out) == (2, "")
    assert re.match(r"error: process 0 of 1 on \S+ reads other tokens .* than process 0 \(0123\)", ended.err)
