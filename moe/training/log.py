"""What a training run says of itself: terminal, metrics.jsonl, TensorBoard."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from moe.analysis.compute import account, device_peak
from moe.config import to_json
from moe.data import Dataset, mixing_weights
from moe.errors import UserError
from moe.experiment import Experiment
from moe.heatmap import load_heatmap
from moe.metrics import ConsoleProgress, MetricsLog, NoMetricsLog, Throughput
from moe.processes import first
from moe.training.evaluate import Evaluation

PER_LAYER = (
    "max_violation",
    "entropy",
    "confidence",
    "z",
    "dropped_fraction",
    "experts_per_token",
    "bias_norm",
    "replayed_fraction",
)
# What an interval's line takes from all of its steps; the rest is the latest step's.
OF_EVERY_STEP = ("loss", "cross_entropy", "slice_nll", "slice_targets", "skipped_in_a_row")


class TrainingLog:
    """Gathers the metrics of every step and tells of them at intervals.

    Between intervals metrics stay on the device, so that the host never waits for a step. A context manager,
    which leaves the terminal and the files in order. Of several processes only the first one writes.

    Args:
        experiment: the run's config.
        dataset: its data, for the names of slices.
        directory: the run directory.
        start: steps that an earlier process of the run took.
        begun: what that process gave as `begun_interval`.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        directory: Path,
        start: int = 0,
        begun: Sequence[dict[str, Any]] = (),
    ):
        self._train = experiment.train
        self._slices = dataset.slices
        self._tokens_per_step = experiment.train.batch_size * experiment.data.sequence_length
        self._rate = experiment.optimizer.rate(experiment.train.steps)
        self._flops = account(experiment.model, experiment.data.sequence_length).training_flops
        self._peak = jax.device_count() * device_peak(experiment.model.dtype)
        self._started = time.perf_counter()
        self._pending: list[dict[str, Any]] = list(begun)
        self._first = start + 1
        self._timed = self._first  # the step up to which the throughput has been told
        self._shown: dict[str, str] = {}
        self._throughput = Throughput(window=10)
        self._progress = ConsoleProgress(experiment.train.steps)
        self._files = MetricsLog(directory) if first() else NoMetricsLog()
        self._files.rewind(start or -1)
        self._loads = self._files.history("routing/load")
        self._files.text("config", to_json(experiment))

        mixture = mixing_weights(dataset, experiment.data.weights)
        if start == 0:
            self._files.scalars(0, {f"data/weight/{name}": weight for name, weight in mixture.items()})
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        if jax.process_count() > 1:
            devices += f" in {jax.process_count()} processes"
        self._progress.say(
            f"{experiment.name}: {directory}, {devices}, "
            + ", ".join(f"{name} {weight:.0%}" for name, weight in mixture.items())
        )
        if start:
            self._progress.say(f"going on after step {start}")

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take in one step's metrics, and tell of all since the last interval where one ends.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        self._pending.append(metrics)
        if step == self._first:  # it compiles: time counts from its end
            jax.block_until_ready(metrics)
            self._throughput.tick(0)
        if step % self._train.log_every and step != self._train.steps:
            return
        pending, self._pending = jax.device_get(self._pending), []
        latest, good = pending[-1], [m for m in pending if math.isfinite(m["loss"])]
        loss = _mean([m["cross_entropy"] for m in good])
        speed = self._speed(step)

        scalars = {
            "train/loss": loss,
            "train/balance_loss": latest["balance_loss"],
            "train/gradient_norm": latest["gradient_norm"],
            "train/learning_rate": self._rate(step - 1),
            "train/skipped_steps": latest["skipped"],
            "train/tokens": step * self._tokens_per_step,
            **self._slice_losses(good),
            **self._routing(latest),
            **speed,
        }
        arrays = {}
        if "load" in latest:
            arrays["routing/load"] = latest["load"]
            self._loads.append(latest["load"])
        self._files.scalars(step, scalars, arrays)
        self._progress.update(
            step,
            tokens=step * self._tokens_per_step,
            tokens_per_second=speed.get("speed/tokens_per_second", math.nan),
            loss=loss,
            utilisation=speed.get("speed/utilisation"),
        )
        self._shown["training loss"] = f"{loss:.4f} nats/token"
        if speed:
            self._shown["tokens/s"] = f"{speed['speed/tokens_per_second']:,.0f}"
            self._shown["utilisation"] = f"{speed['speed/utilisation']:.1%} of peak"
        if "max_violation" in latest:
            self._shown["MaxVio"] = f"{latest['max_violation'].mean():.2f} (busiest expert above mean load)"
        self._require_progress(step, int(max(m["skipped_in_a_row"] for m in pending)))

    def begun_interval(self) -> list[dict[str, Any]]:
        """The steps since the last interval ended, as JSON holds them.

        A checkpoint keeps them, so that a resumed run tells of that interval as if it had not been stopped.
        """
        self._pending = jax.device_get(self._pending)
        return [{name: np.asarray(m[name]).tolist() for name in OF_EVERY_STEP} for m in self._pending]

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Tell of an evaluation on the validation data."""
        results = {**{f"/{name}": r for name, r in evaluation.slices.items()}, "": evaluation.total}
        self._files.scalars(
            step,
            {f"validation/loss{name}": r.loss for name, r in results.items()}
            | {f"validation/bits_per_byte{name}": r.bits_per_byte for name, r in results.items()},
        )
        if self._loads:
            self._files.image(step, "routing/load", load_heatmap(np.stack(self._loads)))
        total = evaluation.total
        self._progress.say(
            f"step {step}  validation loss {total.loss:.4f}  bits per byte {total.bits_per_byte:.4f}"
        )
        self._shown["validation loss"] = f"{total.loss:.4f} nats/token"
        self._shown["bits per byte"] = f"{total.bits_per_byte:.4f} on {total.targets:,} validation tokens"

    def pause(self):
        """Context whose time counts as no training: evaluation, checkpoints."""
        return self._throughput.pause()

    def text(self, name: str, text: str) -> None:
        """Lines that go into the log's files alone."""
        self._files.text(name, text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._progress.say(text)

    def summary(self, title: str, rows: dict[str, str]) -> None:
        """The closing table: what was last told, and `rows`."""
        seconds = time.perf_counter() - self._started
        self._progress.summary(title, {**self._shown, "time": f"{seconds:.0f} s", **rows})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        self._files.close()

    def _speed(self, step: int) -> dict[str, float]:
        """Nothing where only the first step of this process has been taken."""
        if step != self._timed:
            self._throughput.tick((step - self._timed) * self._tokens_per_step)
            self._timed = step
        speed = self._throughput.tokens_per_second()
        if math.isnan(speed):
            return {}
        return {"speed/tokens_per_second": speed, "speed/utilisation": speed * self._flops / self._peak}

    def _slice_losses(self, steps: Sequence[dict[str, Any]]) -> dict[str, float]:
        if not steps:
            return {}
        nll = np.sum([m["slice_nll"] for m in steps], axis=0, dtype=np.float64)
        targets = np.sum([m["slice_targets"] for m in steps], axis=0, dtype=np.float64)
        seen = zip(self._slices, nll, targets, strict=True)
        return {f"train/loss/{name}": n / t for name, n, t in seen if t}

    @staticmethod
    def _routing(latest) -> dict[str, float]:
        if "load" not in latest:
            return {}
        told = [name for name in PER_LAYER if name in latest]
        scalars = {f"routing/{name}": latest[name].mean() for name in told}
        return scalars | {f"routing/{name}/layer_{i}": v for name in told for i, v in enumerate(latest[name])}

    def _require_progress(self, step: int, skipped_in_a_row: int) -> None:
        if skipped_in_a_row >= self._train.max_skipped:
            raise UserError(
                f"step {step}: loss or gradient was not finite {skipped_in_a_row} steps in a row "
                f"(train.max_skipped={self._train.max_skipped}); lower optimizer.learning_rate or clip_norm "
                "and start again with --name NEW; the checkpoints from before stay"
            )


def _mean(values: Sequence[Any]) -> float:
    """Mean of scalars; NaN of none."""
    return float(np.mean(np.asarray(values, np.float64))) if values else math.nan
