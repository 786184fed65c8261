"""The steps that can be compiled for a topology."""

from collections.abc import Callable
from dataclasses import dataclass

from moe.experiment import Experiment
from tpu.generation_steps import check_generation, decode, prefill
from tpu.lowered import Lowered, Serving
from tpu.train_step import check_training, train


@dataclass(frozen=True)
class StepKind:
    """One of the programs that a run consists of."""

    lower: Callable[[Experiment, Serving], Lowered]
    """Traces it for the mesh that is set."""

    check: Callable[[Experiment, Serving, int], None]
    """Raises a UserError where so many devices cannot share its batch or the model."""

    what: str
    """A few words for `--help`."""


STEPS = {
    "train": StepKind(train, check_training, "forward, backward, optimizer and metrics of one batch"),
    "prefill": StepKind(
        prefill, check_generation, "a prompt a device, read into a slot, and the first token of each"
    ),
    "decode": StepKind(decode, check_generation, "one more token of every slot"),
}
