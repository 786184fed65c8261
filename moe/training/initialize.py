"""What a run that starts from nothing begins with, where it is made from another run."""

from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from moe.experiment import Experiment
from moe.training.restore import restore
from moe.training.run_directory import read_experiment


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
    trained = restore(directory, other, "last").state.evaluated
    key = jax.random.fold_in(jax.random.key(experiment.seed), 1)
    return lambda fresh: init(other.model, trained, experiment.model, fresh, key)
