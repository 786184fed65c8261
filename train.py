"""Train a model from a config.

    uv run train.py configs/quickstart.py
    uv run train.py configs/quickstart.py --train.steps 50 --model.moe.routing.k 1 --name short
    uv run train.py configs/quickstart.py --help

Start the same command again to go on after a kill: the run continues bit-identically from its newest
intact checkpoint. Over several machines it is the same command on each of them: docs/clusters.md.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from moe.checkpoint import CheckpointStore
from moe.config import load_config, override
from moe.data import Dataset, prepare, train_batches
from moe.errors import UNFINISHED, UserError, run_main
from moe.experiment import Experiment
from moe.mesh import make_mesh
from moe.nn import structure
from moe.nn.quantized import deployed, pretend
from moe.processes import first, first_decides, joined, name
from moe.training.evaluate import evaluate, own_rows, to_devices
from moe.training.initialize import starting_point
from moe.training.layout import layout_table
from moe.training.log import TrainingLog
from moe.training.profiler import Profiler
from moe.training.run_directory import check_directory, check_processes, claimed
from moe.training.state import abstract_state, initial_state
from moe.training.step import make_eval_step, make_train_step


def main() -> None:
    """Read the command line and train."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("give a config first, for example: uv run train.py configs/quickstart.py")
    path, arguments = sys.argv[1], sys.argv[2:]
    experiment, description = load_config(path, Experiment)
    experiment = override(experiment, arguments, prog=f"train.py {path}", description=description)
    with joined(agree_on_sigterm=True):
        finished = train(experiment, Path("runs") / experiment.name)
    if not finished:
        sys.exit(UNFINISHED)


def train(experiment: Experiment, directory: Path) -> bool:
    """Train from the newest intact checkpoint in `directory`, or from the start, to the last step.

    Returns whether it was reached; SIGTERM may ask to stop before.
    """
    settings = experiment.train
    if experiment.quantization.weights:
        raise UserError(
            "quantization.weights is for runs that hold quantised weights; they cannot be trained"
        )
    stop = StopSignal()

    # What is wrong shows before anything is written into the run directory, the cheapest checks first.
    jax.set_mesh(make_mesh(experiment.mesh))
    experiment.check_devices(jax.device_count())
    check_processes(experiment)
    check_directory(directory, experiment)
    dataset = prepare(experiment.data)
    check_tokens(dataset)
    experiment.check_vocabulary(dataset.vocab_size)

    graph, shapes = structure(experiment.model)
    transformation = experiment.optimizer.build(shapes, settings.steps)
    average = settings.average_decay > 0
    train_step = make_train_step(
        graph,
        transformation,
        accumulation=settings.accumulation,
        chunks=settings.loss_chunks,
        average_decay=settings.average_decay,
        pretend=pretend(experiment.quantization),
    )
    eval_step = make_eval_step(graph, chunks=settings.loss_chunks)
    key = jax.random.key(experiment.seed)
    batches = train_batches(
        dataset,
        batch_size=settings.batch_size,
        sequence_length=experiment.data.sequence_length,
        weights=experiment.data.weights,
        seed=experiment.seed,
        rows=own_rows(settings.batch_size),
    )

    for what in experiment.model.looks_ahead if first() else ():
        print(f"note: {what} lets tokens see later ones: the model cannot generate", file=sys.stderr)

    checkpoints = CheckpointStore(directory / "checkpoints", experiment.checkpoints)
    begun = first_decides(lambda: bool(checkpoints.steps()))
    start_from = None if begun else starting_point(experiment)
    with claimed(directory, experiment), checkpoints:
        abstract = abstract_state(experiment.model, transformation, average=average)
        restored = checkpoints.restore(abstract)
        needs = layout_table(experiment, abstract)
        if restored:
            start, state, position = restored
            check_dataset(position, dataset, directory)
            batches.set_state(position["batches"])
        else:
            print(needs)
            start, position = 0, {"begun_interval": []}
            state = initial_state(
                experiment.model, transformation, seed=experiment.seed, average=average, start=start_from
            )
        if start == settings.steps:
            print(f"{directory} is complete: all {start} steps are done\nnext  uv run eval.py {directory}")
            return True

        log = TrainingLog(experiment, dataset, directory, start, position["begun_interval"])
        profiler = Profiler(
            settings.profile and first(), start, settings.steps, directory / "profile", log.say
        )
        with log, profiler:
            log.text("layout", needs)
            stop.defer()
            for step in range(start + 1, settings.steps + 1):
                profiler.before(step, state)
                batch = next(batches)
                state, metrics = train_step(
                    state, key, to_devices(batch["tokens"]), to_devices(batch["slice"]), len(dataset.slices)
                )
                log.step(step, metrics)

                last, loss = step == settings.steps, None
                if last or due(step, settings.evaluate_every):
                    with log.pause():
                        evaluation = evaluate(
                            eval_step,
                            deployed(state.evaluated, experiment.quantization, experiment.model.dtype),
                            state.controllers,
                            dataset,
                            experiment.data,
                            batch_size=settings.batch_size // settings.accumulation,
                            tokens=None if last else settings.evaluate_tokens,
                        )
                    log.evaluation(step, evaluation)
                    loss = evaluation.total.loss

                stopping = stop.agreed() and not last
                # Amid skipped steps a checkpoint could push out the last one from before the trouble.
                saving = due(step, experiment.checkpoints.every) and not state.skipped_in_a_row
                if last or stopping or saving:
                    with log.pause():
                        position = {
                            "dataset": dataset.fingerprint,
                            "batches": batches.get_state(),
                            "begun_interval": log.begun_interval(),
                        }
                        checkpoints.save(step, state, position, loss, wait=last or stopping)
                if stopping:
                    log.say(f"stopped by SIGTERM after step {step} and saved; the same command goes on")
                    return False

            title = f"{experiment.name}: {settings.steps} steps done"
            log.summary(title, {"run": str(directory), "next": f"uv run eval.py {directory}"})
            return True


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def check_tokens(dataset: Dataset) -> None:
    """Refuse to train as one of several processes that read different data.

    Raises:
        UserError: the tokens are not those of the first process.
    """
    of_first = first_decides(lambda: dataset.fingerprint)
    if dataset.fingerprint != of_first:
        raise UserError(
            f"{name()} reads other tokens ({dataset.fingerprint} in {dataset.folder}) than process 0 "
            f"({of_first}); give all machines the same text, or one data.cache"
        )


def check_dataset(position: dict[str, Any], dataset: Dataset, directory: Path) -> None:
    """Refuse to go on with other data than a run began with.

    Raises:
        UserError: the tokens are not those that the position in the checkpoint is a position in.
    """
    if position["dataset"] != dataset.fingerprint:
        raise UserError(
            f"the text or the tokenizer of {directory} has changed since its last checkpoint (tokens "
            f"{position['dataset']} then, {dataset.fingerprint} in {dataset.folder} now); "
            "put them back, or pass --name NEW to start over"
        )


class StopSignal:
    """SIGTERM, a scheduler's request to leave: ends the process at once; once deferred, it sets a flag.

    Of several processes none ends at once, and all stop after the same step, whichever was asked.
    """

    def __init__(self):
        self.requested = False
        self._deferred = False
        self._step = 0
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._request)

    def defer(self) -> None:
        """From now on there are steps to save: the loop calls `agreed` after each."""
        self._deferred = True

    def agreed(self) -> bool:
        """Whether to stop now; every process calls it after each step."""
        self._step += 1
        self.requested |= multihost_utils.reached_preemption_sync_point(self._step)
        return self.requested

    def _request(self, *_):
        self.requested = True
        if not self._deferred:
            print("stopped by SIGTERM before a step was taken; the same command starts again")
            sys.exit(UNFINISHED)


if __name__ == "__main__":
    run_main(main)
