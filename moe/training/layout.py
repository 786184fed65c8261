"""What a run takes of each device, told before it starts."""

import jax

from moe.analysis.layout import Step, table
from moe.experiment import Experiment
from moe.training.state import TrainState


def layout_table(experiment: Experiment, state: TrainState) -> str:
    """Memory and traffic of a training step on the mesh that is set.

    Args:
        experiment: the run's config.
        state: shapes and shardings (`abstract_state`).
    """
    settings = experiment.train
    step = Step(
        experiment.model,
        sequences=settings.batch_size // settings.accumulation,
        length=experiment.data.sequence_length,
        accumulation=settings.accumulation,
        loss_chunks=settings.loss_chunks,
    )
    parts = {"parameters": state.params, "optimizer": state.optimizer, "average": state.average}
    return table(step, {kind: part for kind, part in parts.items() if jax.tree.leaves(part)})
