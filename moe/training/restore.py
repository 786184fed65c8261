"""A run's checkpoints by the names that a command line gives them."""

import sys
from pathlib import Path

from moe.checkpoint import CheckpointStore, Restored
from moe.errors import UserError
from moe.experiment import Experiment
from moe.processes import first_decides
from moe.seal import find_damage
from moe.training.state import abstract_evaluated


def restore(directory: Path, experiment: Experiment, which: str) -> Restored:
    """What is evaluated of a checkpoint, on the mesh that is set.

    Args:
        directory: of the run.
        experiment: the run's.
        which: `last`, `best` (lowest validation loss while training) or a step.

    Raises:
        UserError: there is none, or it is damaged.
    """
    abstract = abstract_evaluated(
        experiment.model,
        average=experiment.train.average_decay > 0,
        weights=experiment.quantization.weights,
    )
    with CheckpointStore(directory / "checkpoints", experiment.checkpoints) as store:
        if which == "last":
            restored = store.restore(abstract, whole=False)
            if restored is None:
                raise UserError(f"{directory} has no checkpoint yet; train on, or lower checkpoints.every")
            return restored
        step = int(which) if which.isdecimal() else None
        if which == "best":
            step = first_decides(store.best_step)
        if step is None:
            raise UserError(
                f"--checkpoint {which}: say last, best (if the run evaluated) or one of {store.steps()}"
            )
        return store.restore_step(step, abstract, whole=False)


def steps_before(directory: Path, experiment: Experiment, step: int) -> list[int]:
    """Steps of the intact checkpoints before one; a line on stderr names those that are damaged."""
    return first_decides(lambda: _steps_before(directory, experiment, step))


def _steps_before(directory: Path, experiment: Experiment, step: int) -> list[int]:
    checkpoints = directory / "checkpoints"
    with CheckpointStore(checkpoints, experiment.checkpoints) as store:
        steps = [earlier for earlier in store.steps() if earlier < step]
    damage = {earlier: find_damage(checkpoints / str(earlier)) for earlier in steps}
    for earlier, what in damage.items():
        if what:
            print(f"checkpoint {earlier} is damaged ({what}): left out", file=sys.stderr)
    return [earlier for earlier in steps if not damage[earlier]]
