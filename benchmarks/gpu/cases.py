"""Measured programs that go through a list of cases, and the side that asks them.

A case answers with records; one that fails answers with why, and the others go on. See `benchmarks/worker.py`
for how two processes talk.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.worker import Task, Worker, WorkerError, serve

Record = dict[str, Any]


def serve_cases(start: Callable[[Task], tuple[dict[str, Any], Callable[[Any], Iterator[Record]]]]) -> None:
    """The measured side.

    Args:
        start: from the task to what is to be told once (versions), and what makes the records of a case. The
            cases are the task's, and are asked for by their index.
    """

    def prepare(task: Task):
        told, measure = start(task)
        return told, lambda index: {"records": list(attempt(lambda: measure(task["cases"][index])))}

    serve(prepare)


def attempt(records: Callable[[], Iterator[Record]], **what: str) -> Iterator[Record]:
    """All records up to the first error, whatever it is, which becomes one: what else there is can still run.

    Args:
        records: makes them.
        what: said of the record that tells of an error.
    """
    try:
        yield from records()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        yield what | {"failed": f"{type(error).__name__}: {lines[0]}"[:200]}


@dataclass(frozen=True)
class Program:
    """A measured program of one name in the tables."""

    name: str
    script: str
    python: Path = Path(sys.executable)
    path: tuple[Path, ...] = ()
    """Folders of packages that it needs besides."""
    environment: dict[str, str] = field(default_factory=dict)
    task: Task = field(default_factory=dict)


def measure(program: Program, cases: Sequence[Any], limit: float, deadline: float) -> dict[str, Any]:
    """Every case's records, and what the program told of itself.

    Args:
        program: is started again where a case ended it; where it cannot start, no case is tried again.
        cases: each with a "name".
        limit: seconds that a case may take, its compilation included.
        deadline: `time.monotonic()` after which nothing is measured any more.
    """
    told: dict[str, Any] = {"program": program.name, "records": []}
    worker, broken = None, ""
    for index, case in enumerate(cases):
        left = deadline - time.monotonic()
        broken = broken or ("no time was left" if left < 5 else "")
        records = [{"failed": broken}]
        if not broken:
            try:
                worker = worker or _started(program, cases, min(limit, left))
                told |= worker.ready
                records = worker.ask(index, min(limit, left))["records"]
            except (WorkerError, OSError) as error:
                records = [{"failed": str(error)[:200]}]
                broken = "" if worker else records[0]["failed"]
                worker = worker and worker.__exit__()
        told["records"] += [{"program": program.name, "case": case["name"]} | record for record in records]
        _tell(program, case, records)
    if worker:
        worker.__exit__()
    return told


def _started(program: Program, cases: Sequence[Any], limit: float) -> Worker:
    task = program.task | {"cases": list(cases)}
    extras = {"path": program.path, "environment": program.environment}
    return Worker(program.python, program.script, task, limit, **extras)


def _tell(program: Program, case: Any, records: list[Record]) -> None:
    failed = [record["failed"] for record in records if "failed" in record]
    came = "; ".join([f"{len(records) - len(failed)} figures", *failed])
    print(f"{program.name}, {case['name']}: {came}", file=sys.stderr, flush=True)
