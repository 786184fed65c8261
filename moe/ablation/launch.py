"""Trains the runs of a sweep: one after the other in this process, or as jobs of a SLURM cluster.

Locally all runs share a process. A subprocess for each would keep a crash of the interpreter from the others;
but importing and starting takes longer than the first steps of a small model, and every process would compile
anew. On the quickstart's model cut to 20 steps a run took 26 s as a subprocess, 21 s in one process, and 12 s
there with compiled programs kept on disk (2 cores): what a seed changes is an argument of the program, so all
seeds of a row, and every launch of the sweep, share it. An exception in a run is recorded and the sweep goes
on; a crash or a kill ends it, and the same command goes on where it was.
"""

import contextlib
import gc
import inspect
import json
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe.ablation.ablation import Run
from moe.ablation.progress import Listener, SweepProgress
from moe.ablation.results import FAILURE, MACHINE, read_result
from moe.errors import UNFINISHED, UserError, one_line
from moe.experiment import Experiment
from moe.machine import machine

Train = Callable[[Experiment, Path], Any]
"""`train` of train.py: returns at the run's last step, or earlier if SIGTERM asked it to."""


@dataclass(frozen=True)
class Slurm:
    """What each job asks of the cluster: one run on one node."""

    partition: str = ""
    """Partition; empty takes the cluster's default."""

    account: str = ""
    """Account to charge; empty takes yours."""

    gpus: int = 0
    """GPUs of a job."""

    cpus: int = 8
    """CPU cores of a job."""

    memory_gb: int = 0
    """Memory of a job; 0 takes the cluster's default."""

    minutes: int = 240
    """Time limit of a job. One that reaches it is queued again, and goes on from its newest checkpoint."""

    parallel: int = 16
    """Most jobs at a time."""

    def __post_init__(self):
        for name, least in (("gpus", 0), ("cpus", 1), ("memory_gb", 0), ("minutes", 1), ("parallel", 1)):
            if getattr(self, name) < least:
                raise UserError(f"slurm.{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class Job:
    """The work of one run; a failure is recorded in its directory."""

    run: Run
    train: Train

    def __call__(self) -> bool:
        """Train; False if the run failed."""
        _share_compiled_programs(self.run)
        failure = self.run.directory / FAILURE
        failure.unlink(missing_ok=True)
        try:
            self.train(self.run.experiment, self.run.directory)
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.run.directory.mkdir(parents=True, exist_ok=True)
            failure.write_text(f"{kind}{one_line(error)}\n\n{traceback.format_exc()}", encoding="utf-8")
        if self.run.directory.exists():
            (self.run.directory / MACHINE).write_text(json.dumps(machine()), encoding="utf-8")
        return not failure.exists()

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is up: the same, for a run goes on by itself."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]  (an extra)

        return DelayedSubmission(self)


def run_here(
    runs: Sequence[Run],
    train: Train,
    progress: SweepProgress,
    *,
    asked_to_leave: Callable[[Any], bool],
    after_each: Callable[[Run], object],
) -> bool:
    """Train every run that is not finished, in this process.

    Args:
        runs: in order.
        train: what trains one.
        progress: told of everything.
        asked_to_leave: whether the SIGTERM handler that `train` left behind has been called: a run takes its
            last step in any case.
        after_each: called when a run has ended, well or not.

    Returns:
        False if SIGTERM ended it early.
    """
    signal.signal(signal.SIGTERM, _leave)
    with progress:
        for run in (run for run in runs if not run.finished):
            progress.begin(run)
            # train() tells of its steps on standard output; here they become part of the sweep's line.
            with contextlib.redirect_stdout(Listener(progress.told)):
                ended_well = Job(run, train)()
            leaving = asked_to_leave(signal.signal(signal.SIGTERM, _leave))
            if ended_well and not run.finished:
                return False  # it was asked to leave, and has said so
            result = read_result(run)
            quality = f"validation loss {result.loss:.4f}  bits per byte {result.bits_per_byte:.4f}"
            progress.end(run, quality if ended_well else f"failed: {result.failure}")
            # Programs and arrays of a run that is over would pile up.
            jax.clear_caches()
            gc.collect()
            after_each(run)
            if leaving:
                _leave()
    return True


def submit(
    runs: Sequence[Run], train: Train, slurm: Slurm, folder: Path, cluster: str = "slurm"
) -> list[str]:
    """Submit a job for every run that is not finished, as one array.

    Args:
        runs: in order.
        train: what trains one; jobs import it.
        slurm: what each job asks for.
        folder: gets batch files, pickled jobs and what they print; every node must see it.
        cluster: submitit's name of the executor: slurm, or local and debug to try without a cluster.

    Returns:
        The jobs' ids.

    Raises:
        UserError: submitit is missing, or this is no SLURM cluster.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise UserError("--launcher slurm needs submitit: start with `uv run --extra slurm`") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=1000)
    except RuntimeError as error:
        raise UserError(f"--launcher slurm: {one_line(error)}") from error
    # Modules that the user brings lie in the current folder.
    path = ":".join([str(Path(inspect.getfile(train)).parent), str(Path.cwd())])
    executor.update_parameters(
        name=runs[0].experiment.name.partition("/")[0],
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=slurm.gpus or None,
        cpus_per_task=slurm.cpus,
        mem_gb=slurm.memory_gb or None,
        timeout_min=slurm.minutes,
        slurm_partition=slurm.partition or None,
        slurm_account=slurm.account or None,
        slurm_array_parallelism=slurm.parallel,
        slurm_setup=[f"export PYTHONPATH={shlex.quote(path)}${{PYTHONPATH:+:$PYTHONPATH}}"],
    )
    with executor.batch():
        jobs = [executor.submit(Job(run, train)) for run in runs if not run.finished]
    return [job.job_id for job in jobs]


def _leave(*_: object) -> None:
    print("stopped by SIGTERM; the same command goes on")
    sys.exit(UNFINISHED)


def _share_compiled_programs(run: Run) -> None:
    """Keeps compiled programs in the sweep's folder, unless the user has a place for them."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = run.directory.parents[1] / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
