"""A run that is killed, asked to leave or robbed of a checkpoint ends as if nothing had happened."""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from workshop import TINY, Workshop, assert_same_run, fingerprint

import moe.training.evaluate
import moe.training.state
from moe.errors import UNFINISHED
from moe.training.log import TrainingLog


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> Path:
    """The run that nothing happens to."""
    ended = workshop.call(*command("whole"))
    assert (ended.code, ended.err) == (0, "")
    return workshop.runs / "whole"


def command(name: str, *arguments: str) -> list[str]:
    return ["train.py", TINY, "--name", name, *arguments]


def written(run: Path) -> set[str]:
    """Steps whose checkpoint stands in the run, or is being written."""
    folder = run / "checkpoints"
    return {entry.name.split(".")[0] for entry in folder.iterdir()} if folder.exists() else set()


def kill_at_write(process: subprocess.Popen, run: Path, count: int, delay: float) -> None:
    """SIGKILL so many seconds after the process began to write its `count`-th checkpoint."""
    before = seen = written(run)
    while len(seen - before) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
        seen = seen | written(run)
    time.sleep(delay)
    process.kill()
    process.communicate()


def killed(workshop: Workshop, *, devices: int, kills: int) -> Path:
    """A run that reached its end over several kills."""
    run, choose = workshop.runs / f"killed{devices}", random.Random(devices)
    often = command(run.name, "--checkpoints.every", "1")
    for _ in range(kills):
        process = workshop.start(*often, devices=devices)
        # A write takes some 50 ms: about half of the kills fall into one.
        kill_at_write(process, run, choose.randint(1, 4), 0.1 * choose.random())
    ended = workshop.run(*often, devices=devices)
    assert (ended.code, ended.err) == (0, "")
    return run


def test_kills_at_any_moment_change_nothing(workshop: Workshop):
    assert workshop.run(*command("whole1")).code == 0
    assert_same_run(killed(workshop, devices=1, kills=2), workshop.runs / "whole1")


def test_a_kill_on_eight_devices_changes_nothing(workshop: Workshop, whole: Path):
    assert_same_run(killed(workshop, devices=8, kills=1), whole)


class CrashError(Exception):
    """The process is gone in the middle of something."""


def at_call(number: int, function: Callable, happens: Callable[[], None]) -> Callable:
    """The function, with something that happens at the beginning of one of its calls."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            happens()
        return function(*args, **kwargs)

    return wrapped


def crash() -> None:
    raise CrashError


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash_after(step: int, workshop: Workshop, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(TrainingLog, "step", at_call(step, TrainingLog.step, crash))
        workshop.call(*arguments)


def test_a_crash_amid_an_interval_changes_nothing(workshop: Workshop):
    other = ("--train.accumulation", "1", "--train.average_decay", "0", "--model.moe.balance", "(ZLoss(),)")
    other += ("--optimizer", "Muon()", "--mesh.expert", "4", "--train.steps", "8")
    assert workshop.call(*command("other", *other)).code == 0
    # The checkpoint of step 4 holds the first steps of the line that is logged at step 5.
    crash_after(7, workshop, *command("crashed-other", *other))
    ended = workshop.call(*command("crashed-other", *other))
    assert "going on after step 4" in ended.out
    assert_same_run(workshop.runs / "crashed-other", workshop.runs / "other")


def test_sigterm_saves_and_the_same_command_goes_on(workshop: Workshop, whole: Path, monkeypatch):
    state, evaluation = moe.training.state, moe.training.evaluate
    moments = [  # what is under way, and what is said
        (
            state,
            "initial_state",
            1,
            "stopped by SIGTERM before a step was taken; the same command starts again",
        ),
        (evaluation, "to_devices", 1, "stopped by SIGTERM after step 1 and saved; the same command goes on"),
        (
            evaluation,
            "validation_batches",
            2,
            "stopped by SIGTERM after step 8 and saved; the same command goes on",
        ),
        (TrainingLog, "step", 5, "stopped by SIGTERM after step 13 and saved; the same command goes on"),
    ]
    for module, name, call, said in moments:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, at_call(call, getattr(module, name), sigterm))
            ended = workshop.call(*command("asked"))
        assert (ended.code, ended.err) == (UNFINISHED, "")
        assert ended.out.splitlines()[-1] == said
    assert workshop.call(*command("asked")).code == 0
    assert_same_run(workshop.runs / "asked", whole)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 4
    file.write_bytes(contents)


@pytest.fixture(scope="module")
def crashed(workshop: Workshop) -> str:
    """A run that has checkpoints 16 and 20."""
    crash_after(23, workshop, *command("crashed"))
    return "crashed"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    workshop: Workshop, whole: Path, crashed: str, damage
):
    run = workshop.copy(crashed, damage.__name__)
    state = [path for path in (run / "checkpoints" / "20" / "state").rglob("*") if path.is_file()]
    damage(max(state, key=lambda file: file.stat().st_size))
    ended = workshop.call(*command(run.name))
    assert ended.code == 0
    assert re.fullmatch(
        r"checkpoint 20 is damaged \(state/.* has changed\): using checkpoint 16\n", ended.err
    )
    assert "going on after step 16" in ended.out
    assert_same_run(run, whole)


def test_a_finished_run_says_so_and_stays_as_it_is(workshop: Workshop, whole: Path):
    before = fingerprint(whole)
    ended = workshop.call(*command("whole"))
    assert ended == (
        0,
        "runs/whole is complete: all 24 steps are done\nnext  uv run eval.py runs/whole\n",
        "",
    )
    assert fingerprint(whole) == before
