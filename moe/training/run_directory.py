"""A run directory: what a run writes, and all that is needed to take it up again.

runs/NAME/config.json       the experiment; another experiment may not use the directory
runs/NAME/checkpoints/      see `moe.checkpoint`
runs/NAME/metrics.jsonl     see `moe.metrics`
runs/NAME/tensorboard/
runs/NAME/profile/          traces, with train.profile
runs/NAME/report/           what `eval.py` finds
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.config import difference, from_json, to_json
from moe.errors import UserError
from moe.experiment import Experiment
from moe.processes import first, first_decides, name

CONFIG = "config.json"
LOCK = ".lock"


def read_experiment(directory: Path) -> Experiment:
    """The experiment whose run lies in `directory`.

    Raises:
        UserError: there is no run, or its config cannot be read.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(
            f"{directory} holds no run ({CONFIG} is missing); give a directory that train.py made"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); put back a copy of it") from error
    return from_json(text, Experiment, source=str(path))


def check_directory(directory: Path, experiment: Experiment) -> None:
    """Refuse a directory that holds another run, or an experiment that config.json cannot hold.

    Writes nothing.

    Raises:
        UserError: one line that names the first fields that differ.
    """
    to_json(experiment)
    if not (directory / CONFIG).exists():
        return
    differences = difference(read_experiment(directory), experiment)
    if differences:
        shown = "; ".join(differences[:3]) + (" ..." if len(differences) > 3 else "")
        raise UserError(
            f"{directory} holds a run of another config ({shown}); pass --name NEW or remove the directory"
        )


def check_processes(experiment: Experiment) -> None:
    """Refuse to train as one of several processes that were started with different configs.

    Raises:
        UserError: one line that names this process and the first fields that differ.
    """
    of_first = from_json(first_decides(lambda: to_json(experiment)), Experiment, source="process 0")
    differences = difference(of_first, experiment)
    if differences:
        shown = "; ".join(differences[:3]) + (" ..." if len(differences) > 3 else "")
        raise UserError(
            f"{name()} has another config than process 0 ({shown}); start all with the same command"
        )


@contextmanager
def claimed(directory: Path, experiment: Experiment) -> Iterator[None]:
    """Make the directory this experiment's, and keep other runs out of it; the first process does so for all.

    Raises:
        UserError: it belongs to another experiment, another process trains in it, or it cannot be written.
    """
    if not first():
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot write the run directory {directory}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {directory}; wait for it or stop it") from None
        check_directory(directory, experiment)
        _write_config(directory / CONFIG, experiment)
        yield


def _write_config(path: Path, experiment: Experiment) -> None:
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_json(experiment), encoding="utf-8")
        temporary.replace(path)
