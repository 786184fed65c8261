"""What a run that starts from nothing begins with, where it is made from another run."""

from pathlib import Path

import jax
from flax import nnx

from moe.experiment import Experiment
from moe.training.restore import restore
from moe.training.run_directory import read_experiment
from moe.training.state import StartingPoint


def starting_point(experiment: Experiment) -> StartingPoint | None:
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
    state = restore(directory, other, "last").state
    trained, trained_controllers = state.evaluated, state.controllers
    key = jax.random.fold_in(jax.random.key(experiment.seed), 1)

    def start(params: nnx.State, controllers: nnx.State) -> tuple[nnx.State, nnx.State]:
        made = init(other.model, trained, experiment.model, params, key)
        return made, init.controllers(trained_controllers, controllers)

    return start
