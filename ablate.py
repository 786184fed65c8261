"""Train a base config with every choice of every axis and every seed, and compare them.

    uv run ablate.py configs/ablations/routing_quick.py
    uv run ablate.py configs/ablations/routing_quick.py --dry-run
    uv run ablate.py configs/ablations/routing_quick.py --base.train.steps 50 --seeds 0 1 --name short
    uv run ablate.py configs/ablations/routing_quick.py --report-only

Writes runs/NAME/report/: index.html, report.md, results.json. Start the same command again to go on after a
kill: finished runs stay, an unfinished one continues, a failed one is tried again. The exit code is 0,
1 where a run failed, 2 for bad input.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import jax

from moe.ablation import (
    Ablation,
    Commands,
    Run,
    Slurm,
    SweepProgress,
    computes,
    describe_plan,
    load_ablation,
    quality_table,
    read_result,
    run_here,
    submit,
    summarise,
    training_flops,
    write_report,
)
from moe.config import override
from moe.data import prepare
from moe.errors import UNFINISHED, UserError, run_main
from moe.mesh import make_mesh
from train import StopSignal, train

ROOT = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Command(Ablation):
    """An ablation, and what to do with it."""

    launcher: Literal["local", "slurm"] = "local"
    """Train here, one run after the other, or submit a job for each run to a SLURM cluster."""

    slurm: Slurm = field(default_factory=Slurm)
    """What each job asks of the cluster."""

    dry_run: bool = False
    """List runs, parameters, FLOPs and estimated time; train nothing."""

    report_only: bool = False
    """Write the report from what is there; train nothing."""

    only: str = "*"
    """Rows to train or list, as a pattern of their names such as "top-2,*"; the report has all."""

    utilisation: float = 0.1
    """Share of the device's peak FLOP/s that a dry run assumes where no run of the sweep was measured."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.utilisation <= 1:
            raise UserError(f"utilisation={self.utilisation} must lie in (0, 1]")


def main() -> None:
    """Read the command line, train what is missing, report."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError(
            "give an ablation first, for example: uv run ablate.py configs/ablations/routing_quick.py"
        )
    path = sys.argv[1]
    ablation, description = load_ablation(path)
    command = Command(**{each.name: getattr(ablation, each.name) for each in fields(Ablation)})
    command = override(command, sys.argv[2:], prog=f"ablate.py {path}", description=description)
    report = Report(command, description, Path(path))

    rows = [row for row in command.rows() if fnmatchcase(row.name, command.only)]
    if not rows:
        names = ", ".join(row.name for row in command.rows())
        raise UserError(f"--only {command.only} fits no row; there are {names}")
    runs = [run for run in command.runs(ROOT) if run.row in {row.name for row in rows}]
    results = [read_result(run) for run in runs]
    if command.dry_run:
        baseline = next(row for row in command.rows() if row.name == command.baseline_name)
        print(describe_plan(rows, baseline, results, command.utilisation))
        return
    if command.report_only:
        report.write()
        report.show()
        return

    waiting = [run for run in runs if not run.finished]
    if waiting and command.launcher == "slurm":
        jobs = submit(waiting, train, command.slurm, ROOT / command.name / "slurm")
        print(f"{len(jobs)} jobs submitted: {', '.join(jobs)}")
        print(f"what they print: {ROOT / command.name / 'slurm'}; when they are done: --report-only")
        return
    check(waiting)
    cost = computes(rows)
    flops = {result.run.row: training_flops(result, cost[result.run.row]) for result in results}
    last_of_seed = {run.seed: run for run in waiting}
    to_its_end = run_here(
        waiting,
        train,
        SweepProgress(results, flops),
        asked_to_leave=asked_to_leave,
        after_each=lambda run: report.write() if run == last_of_seed[run.seed] else None,
    )
    if not to_its_end:
        sys.exit(UNFINISHED)
    report.write()
    report.show()
    failed = [result for result in map(read_result, runs) if result.status == "failed"]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again", file=sys.stderr)
        sys.exit(1)


class Report:
    """The report of a sweep, from what its runs have left so far."""

    def __init__(self, ablation: Ablation, description: str, file: Path):
        self._ablation, self._description = ablation, description
        self._folder = ROOT / ablation.name / "report"
        self._configs = [file.parent, file.parent.parent]

    def write(self) -> None:
        """Write it anew."""
        self._sweep = summarise(
            self._ablation, self._description, [read_result(run) for run in self._ablation.runs(ROOT)]
        )
        self._file = write_report(self._sweep, Commands(self._configs), self._folder)

    def show(self) -> None:
        """Print its first table, and where the rest is."""
        print(f"\n{quality_table(self._sweep)}\n")
        done = sum(result.status == "finished" for result in self._sweep.results)
        print(f"{done} of {len(self._sweep.results)} runs finished; report: {self._file}")


def check(runs: Sequence[Run]) -> None:
    """Refuse what this machine or the text cannot do before any run starts.

    Raises:
        UserError: one line naming the field.
    """
    datasets = {}
    for run in runs:
        make_mesh(run.experiment.mesh)
        run.experiment.check_devices(jax.device_count())
        data = run.experiment.data
        if data not in datasets:
            datasets[data] = prepare(data)
        run.experiment.check_vocabulary(datasets[data].vocab_size)


def asked_to_leave(handler: Any) -> bool:
    """Whether SIGTERM came while a run took its last step, when its loop has no more use for it."""
    loop = getattr(handler, "__self__", None)
    return isinstance(loop, StopSignal) and loop.requested


if __name__ == "__main__":
    run_main(main)
