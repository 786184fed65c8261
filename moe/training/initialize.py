"""What a run that starts from nothing begins with, where it is made from another run."""

from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from moe.checkpoint import CheckpointStore
from moe.errors import UserError
from moe.experiment import Experiment
from moe.training.run_directory import read_experiment
from moe.training.state import abstract_evaluated


def starting_point(experiment: Experiment) -> Callable[[nnx.State], nnx.State] | None:
    """From parameters drawn at random to those that `Experiment.init` makes of another run; None without it.

    Reads the other run's newest checkpoint: parameters as it is evaluated, the moving average where it has
    one.

    Raises:
        UserError: there is no such run, it has no intact checkpoint, or its model does not fit.
    """
    init = experiment.init
    if init is None:
        return None
    directory = Path(init.run)
    other = read_experiment(directory)
    init.check(other.model, experiment.model)
    trained = _trained(directory, other)
    key = jax.random.fold_in(jax.random.key(experiment.seed), 1)
    return lambda fresh: init(other.model, trained, experiment.model, fresh, key)


def _trained(directory: Path, experiment: Experiment) -> nnx.State:
    """The parameters in a run's newest intact checkpoint, on the mesh that is set.

    Raises:
        UserError: there is none.
    """
    abstract = abstract_evaluated(experiment.model, average=experiment.train.average_decay > 0)
    with CheckpointStore(directory / "checkpoints", experiment.checkpoints) as store:
        restored = store.restore(abstract, whole=False)
    if restored is None:
        raise UserError(f"{directory} has no checkpoint yet; let that run train first")
    return restored.state.evaluated
