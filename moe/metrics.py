"""What a run says while it trains: metrics.jsonl, TensorBoard, the console, and tokens per second.

Everything here takes plain numbers and numpy arrays: read device values first.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from moe.errors import UserError

# A loss that is not finite stands in the log as what it is; a warning on the terminal adds nothing.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


class MetricsLog:
    """Writes scalars to `metrics.jsonl` and to TensorBoard, images to TensorBoard.

    A resumed run calls `rewind` before it logs. Log a step before saving its checkpoint: then every step
    stands in the log once, wherever the run was killed.

    Args:
        run_dir: the run directory; gets `metrics.jsonl` and `tensorboard/`.

    Raises:
        UserError: from any method, when the disk is full or refuses the write.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / "metrics.jsonl"
        with self._explained_write_errors():
            tensorboard = self._path.parent / "tensorboard"
            tensorboard.mkdir(parents=True, exist_ok=True)
            self._lines = self._path.open("a", encoding="utf-8")
            self._events = EventsWriter(str(tensorboard / "events"), filename_suffix=f".{time.time_ns()}")

    def scalars(
        self, step: int, values: Mapping[str, float], arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Logs named values, such as {"train/loss": 3.2}; NaN and infinity are null in the JSON.

        Arrays stand in `metrics.jsonl` only, as nested lists of four decimals; `history` reads them back.
        """
        values = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        lists = {
            name: np.round(np.asarray(array, float), 4).tolist() for name, array in (arrays or {}).items()
        }
        with self._explained_write_errors():
            self._lines.write(json.dumps({"step": step, **finite, **lists}) + "\n")
            self._lines.flush()
            for name, value in values.items():
                self._add_event(step, summary=summary.scalar(name, value))
            self._events.flush()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Logs an image, uint8 [height, width, channels], to TensorBoard."""
        picture = summary.image(name, pixels, dataformats="HWC")
        with self._explained_write_errors():
            self._add_event(step, summary=picture)
            self._events.flush()

    def text(self, name: str, text: str) -> None:
        """Logs a text, such as a config, to TensorBoard, set as code."""
        code = "\n".join("    " + line for line in text.splitlines())
        with self._explained_write_errors():
            self._add_event(0, summary=summary.text(name, code))
            self._events.flush()

    def history(self, name: str) -> list[np.ndarray]:
        """Reads back every value of an array that was logged, in order."""
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return [np.asarray(line[name]) for line in lines if name in line]

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`, as the run goes on from there (-1: it starts anew)."""
        with self._explained_write_errors():
            self._lines.close()
            kept = [
                line for line in self._path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step
            ]
            temporary = self._path.with_suffix(".jsonl.tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(self._path)
            self._lines = self._path.open("a", encoding="utf-8")
            # TensorBoard then hides what it was told before about this and later steps.
            self._add_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def close(self) -> None:
        """Closes the files; every call before has reached the disk already."""
        with self._explained_write_errors():
            self._lines.close()
            self._events.close()

    def _add_event(self, step: int, **what: Any) -> None:
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk unseen, then blocks whoever logs.
        self._events.write_event(Event(step=step, wall_time=time.time(), **what))

    @contextmanager
    def _explained_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the metrics to {self._path.parent}: {error.strerror}; "
                "mend that, then run the same command again"
            ) from error


class NoMetricsLog(MetricsLog):
    """What a process that is not the first logs to: nowhere."""

    def __init__(self) -> None:
        """Opens no file."""

    def scalars(
        self, step: int, values: Mapping[str, float], arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Logs nothing."""

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Logs nothing."""

    def text(self, name: str, text: str) -> None:
        """Logs nothing."""

    def history(self, name: str) -> list[np.ndarray]:
        """Nothing was logged."""
        return []

    def rewind(self, step: int) -> None:
        """Nothing was logged."""

    def close(self) -> None:
        """No file is open."""


def _step_of(line: bytes) -> float:
    """Returns the step of a line; infinity for one that a kill left unfinished."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


class Throughput:
    """Tokens per second over the last steps; compilation, evaluation and checkpoints do not count.

    The first `tick` starts the measuring, so the first step, which compiles, is left out by itself.

    Args:
        window: steps to average over.
        clock: seconds, monotonic.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._paused = 0.0  # seconds
        self._ticks: deque[tuple[float, int]] = deque(maxlen=window + 1)  # seconds of work, tokens so far

    def tick(self, tokens: int) -> None:
        """Counts a step of so many tokens; to be called when its loss is read, not when it is dispatched."""
        before = self._ticks[-1][1] if self._ticks else 0
        self._ticks.append((self._clock() - self._paused, before + tokens))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out the time spent inside."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def tokens_per_second(self) -> float:
        """Returns the mean over the window; NaN before the second tick."""
        if len(self._ticks) < 2:
            return math.nan
        (start, tokens_before), (end, tokens) = self._ticks[0], self._ticks[-1]
        return (tokens - tokens_before) / (end - start)


class ConsoleProgress:
    """The console of a training run: one live line on a terminal, one plain line per update elsewhere.

    Args:
        total_steps: steps of the whole run.
        console: where to write; standard output by default.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._total_steps = total_steps
        self._console = console or Console(highlight=False)
        self._bar = Progress(
            TextColumn("step [bold]{task.completed}[/]/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("compiling", total=total_steps)
        if self._console.is_terminal:
            self._bar.start()

    def update(
        self, step: int, *, tokens: int, tokens_per_second: float, loss: float, utilisation: float | None
    ) -> None:
        """Shows how far the run is.

        Args:
            step: steps done.
            tokens: tokens trained on so far, since the run began.
            tokens_per_second: NaN while not known yet.
            loss: mean training loss in nats per token.
            utilisation: share of the device's peak FLOP/s in use, 0 to 1; None where the peak is not known.
        """
        tokens_left = tokens / step * (self._total_steps - step)
        parts = [
            f"loss {loss:.3f}",
            f"{_short(tokens)} tokens",
            f"{_short(tokens_per_second)}/s",
            f"MFU {utilisation:.1%}" if utilisation is not None else "",
            f"ETA {_duration(tokens_left / tokens_per_second)}",
        ]
        text = "  ".join(part for part in parts if part)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self._print(f"step {step}/{self._total_steps}  {text}")

    def say(self, text: str) -> None:
        """Prints a line that stays, such as a validation loss."""
        self._print(text)

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """Ends the live line and prints the closing table: one row per name and value."""
        self.close()
        if self._console.is_terminal:
            table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
            for name, value in rows.items():
                table.add_row(f"[cyan]{name}[/]", value)
            self._console.print()
            self._console.print(table)
        else:
            width = max(map(len, rows), default=0)
            self._print("\n".join(["", title, *(f"{name:{width}}  {value}" for name, value in rows.items())]))

    def close(self) -> None:
        """Ends the live line."""
        if self._bar.live.is_started:
            self._bar.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _short(number: float) -> str:
    """Returns a count to three digits: 950, 12.3k, 4.56M."""
    if not math.isfinite(number):
        return "–"
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _duration(seconds: float) -> str:
    """Returns h:mm:ss, or m:ss below an hour."""
    if not math.isfinite(seconds):
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
