"""`eval.py RUN --tasks`: tasks of lm-evaluation-harness on a checkpoint."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console
from rich.table import Table

from moe.errors import UserError, one_line

if TYPE_CHECKING:
    from moe.evaluation.language_model import Checkpoint

FILES = (".yaml", ".yml", ".json")  # of a task, as the harness describes one
RESAMPLES = 1000  # for errors of metrics that have no closed form


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what cannot be run, before a checkpoint is read.

    Raises:
        UserError: the harness is not installed, or a file is missing.
    """
    if jax.process_count() > 1:
        raise UserError("--tasks runs in a single process")
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: uv run --extra tasks eval.py …")
    for task in tasks:
        if Path(task).suffix in FILES and not Path(task).is_file():
            raise UserError(f"--tasks {task}: there is no such file")


def run_tasks(
    checkpoint: "Checkpoint", tasks: Sequence[str], *, examples: int, fewshot: int | None
) -> dict[str, Any]:
    """What each task found, as JSON holds it.

    Args:
        checkpoint: the model.
        tasks: names that the harness knows, or files (.yaml, .json) that describe a task as it does.
        examples: most of each task; 0: all.
        fewshot: examples shown before each question; None: as the task says.

    Raises:
        UserError: a task is not known or its data are not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from moe.evaluation.language_model import CheckpointLM

    named = [task for task in tasks if Path(task).suffix not in FILES]
    manager = TaskManager(include_defaults=bool(named))
    unknown = [task for task in named if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"--tasks {unknown[0]}: the harness has no such task; uv run lm-eval ls tasks")
    evaluate: Any = simple_evaluate  # whose decorator hides what it takes
    try:
        found = evaluate(
            CheckpointLM(checkpoint),
            tasks=[_read_json(Path(task)) if task.endswith(".json") else task for task in tasks],
            num_fewshot=fewshot,
            limit=examples or None,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
            task_manager=manager,
        )
    except OSError as error:  # a data set that is not there, or a machine without a network
        raise UserError(f"--tasks: data cannot be loaded ({one_line(error)})") from error
    return {
        "tasks": {
            name: {metric: value for metric, value in measured.items() if isinstance(value, float | int)}
            for name, measured in found["results"].items()
        },
        "examples": {name: told["effective"] for name, told in found["n-samples"].items()},
        "fewshot": dict(found["n-shot"]),
    }


def _read_json(path: Path) -> dict[str, Any]:
    """What a file says of a task, which is named after it unless it says otherwise."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--tasks {path} cannot be read ({one_line(error)})") from error
    if not isinstance(told, dict):
        raise UserError(f"--tasks {path} must hold an object that describes a task as the harness does")
    return {"task": path.stem} | told


def write(folder: Path, found: dict[str, Any]) -> Path:
    """tasks.json, whole or not at all, into `folder`, which is made where it is missing."""
    folder.mkdir(exist_ok=True)
    path, temporary = folder / "tasks.json", folder / "tasks.tmp"
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(path)
    return path


def show(found: dict[str, Any]) -> None:
    """A line for each task and metric."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(("task", "metric", "value", "± error", "examples", "shots")):
        table.add_column(column, justify="left" if i < 2 else "right")
    for name, measured in found["tasks"].items():
        for metric, value in measured.items():
            kind, _, filter_ = metric.partition(",")
            if kind.endswith("_stderr") or not filter_:
                continue
            error = measured.get(f"{kind}_stderr,{filter_}")
            told = "–" if error is None else f"{error:.4f}"
            examples, shots = found["examples"].get(name, ""), found["fewshot"].get(name, "")
            table.add_row(name, kind, f"{value:.4f}", told, str(examples), str(shots))
    Console(highlight=False).print(table)
