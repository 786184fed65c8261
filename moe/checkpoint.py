"""Checkpoints of a run: written in the background, sealed, restored from the newest intact one.

    checkpoints/500/state/          the arrays, written by Orbax
    checkpoints/500/contents.json   step, metric, data position, and the shape and dtype of every leaf
    checkpoints/500/SHA256SUMS      the digest of every file above

A checkpoint is written under a temporary name, sealed with its digests, and only then renamed: a directory
whose name is a step is complete, whenever the process was killed. The seal is checked in full before anything
is read, so a changed bit, a cut or a missing file is found even where Orbax would load it.

Orbax stores a flat mapping from leaf name to array. The tree comes from the abstract state given to restore,
and so do mesh and shardings, which may be others than at the save.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationContext

from moe.errors import UserError
from moe.named_arrays import abstract_plain_arrays, describe, key_impls, named_leaves, plain_arrays, to_state
from moe.processes import first, first_decides
from moe.seal import find_damage, is_intact, seal

STATE, CONTENTS = "state", "contents.json"
WRITING, DELETING = ".writing", ".deleting"  # suffixes of what is no checkpoint yet, or no longer

# Orbax logs the traceback of every failed write besides raising it; here it becomes one line of UserError.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
)
# Orbax writes files concurrently and raises the first failure; asyncio logs the others when their tasks go.
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


def _without_closed_loops(
    report: Callable[["sys.UnraisableHookArgs"], object],
) -> Callable[["sys.UnraisableHookArgs"], None]:
    """Keeps quiet how TensorStore tells of the other files of a failed write: to Orbax, which has gone on."""

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    return hook


sys.unraisablehook = _without_closed_loops(sys.unraisablehook)


@dataclass(frozen=True)
class Checkpoints:
    """When a run saves its state and which checkpoints it keeps."""

    every: int = 500
    """Steps between checkpoints (0: one checkpoint, at the end of the run)."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep (at least 1; with 2, one may turn out damaged)."""
    keep_best: int = 1
    """How many checkpoints of lowest validation loss to keep besides the newest (0: none)."""

    def __post_init__(self) -> None:
        for field, least in (("every", 0), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, field) < least:
                raise UserError(f"checkpoints.{field} is {getattr(self, field)}: it must be at least {least}")


class Restored(NamedTuple):
    """What a checkpoint holds: the step it was saved after, the state and the position in the data."""

    step: int
    state: Any
    position: dict[str, Any]


@dataclass
class CheckpointInfo:
    """What Orbax's preservation policies see of a checkpoint; ours do not ask for its time."""

    step: int
    metrics: dict[str, Any] | None
    time: datetime = datetime.min


class CheckpointStore:
    """The checkpoints of one run: one program writes, any number may read.

    Reading deletes nothing, so an evaluation can look at a run that still trains. Use the store as a context
    manager, or call `close`, so that the last write is waited for.

    Args:
        directory: where the checkpoints stand, on a file system with atomic rename; made by the first save.
        config: which checkpoints to keep.
    """

    def __init__(self, directory: str | Path, config: Checkpoints) -> None:
        self._directory = Path(directory).absolute()
        best = BestN(
            get_metric_fn=lambda metrics: metrics["metric"],
            reverse=True,  # lower is better, and BestN keeps the end of the sorted list
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self._policy = AnyPreservationPolicy([LatestN(config.keep_last), best])
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, ascending; restoring shows if it is intact."""
        if not self._directory.exists():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def best_step(self) -> int | None:
        """Returns the step of lowest metric (of equals the newest), None where no checkpoint has a metric."""
        infos = [self._info(step) for step in self.steps() if step not in self._damaged]
        ranked = [(info.metrics["metric"], -info.step) for info in infos if info.metrics is not None]
        return -min(ranked)[1] if ranked else None

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        metric: float | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Saves the state after `step`: returns once it is safe from change, and writes in the background.

        The caller may donate the state's buffers at once. A step that has a checkpoint is not written again,
        unless that checkpoint turned out damaged.

        Args:
            step: optimizer steps done.
            state: pytree of `jax.Array`, sharded in any way; PRNG keys are welcome.
            position: where the data stands, as JSON-able values.
            metric: what `keep_best` and `best_step` rank by, lower is better; NaN and infinity count as None.
            wait: return only when the checkpoint is on disk.

        Raises:
            UserError: this or the previous checkpoint cannot be written, say because the disk is full.
        """
        self.wait()
        if first_decides(lambda: step in self.steps() and step not in self._damaged):
            return
        leaves = named_leaves(state)
        contents = {
            "step": step,
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
            "position": position,
            "leaves": describe(leaves),
            "key_impls": key_impls(leaves),
        }
        text = json.dumps(contents, indent=1)
        with self._explained_write_errors(step):
            self._remove_leftovers()
            arrays = plain_arrays(leaves)
            args = ocp.args.PyTreeSave(arrays, save_args=jax.tree.map(_by_layer, arrays))
            self._orbax.save(self._path(step, WRITING) / STATE, args=args)
        self._pending = step, self._writer.submit(self._finish, step, text)
        if wait:
            self.wait()

    def restore(self, abstract_state: Any, *, whole: bool = True) -> Restored | None:
        """Restores the newest intact checkpoint; a line on stderr names each newer one that is damaged.

        Args:
            abstract_state: the state's pytree of `jax.ShapeDtypeStruct`; their shardings say where to.
            whole: False where the checkpoint holds more than that, such as the optimizer's state.

        Returns:
            Step, state and data position, or None where no checkpoint was ever completed.

        Raises:
            UserError: every checkpoint is damaged, or the newest intact one is of another architecture.
        """
        self.wait()
        step = first_decides(self._newest_intact)
        return None if step is None else self._load(step, abstract_state, whole)

    def restore_step(self, step: int, abstract_state: Any, *, whole: bool = True) -> Restored:
        """Restores the checkpoint of one step; see `restore`.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or it is of another architecture.
        """
        self.wait()
        first_decides(lambda: self._require_intact(step))
        return self._load(step, abstract_state, whole)

    def wait(self) -> None:
        """Waits for the write under way, if any, and raises what went wrong with it."""
        if self._pending is not None:
            (step, written), self._pending = self._pending, None
            with self._explained_write_errors(step):
                written.result()

    def close(self) -> None:
        """Waits for the last write; the store must not be used afterwards."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _newest_intact(self) -> int | None:
        damage: dict[int, str] = {}
        for step in reversed(self.steps()):
            problem = find_damage(self._path(step))
            if problem is None:
                for damaged, what in damage.items():
                    print(
                        f"checkpoint {damaged} is damaged ({what}): using checkpoint {step}", file=sys.stderr
                    )
                return step
            damage[step] = problem
            self._damaged.add(step)
        if damage:
            named = "; ".join(f"{step} ({what})" for step, what in damage.items())
            raise UserError(
                f"no intact checkpoint in {self._directory}, damaged: {named}; "
                "put back a copy of one, or train into another run directory"
            )
        return None

    def _require_intact(self, step: int) -> None:
        if step not in self.steps():
            raise UserError(f"no checkpoint {step} in {self._directory}: there are {self.steps() or 'none'}")
        problem = find_damage(self._path(step))
        if problem is not None:
            self._damaged.add(step)
            others = [other for other in self.steps() if other not in self._damaged]
            raise UserError(
                f"checkpoint {step} in {self._directory} is damaged ({problem}); others: {others or 'none'}"
            )

    def _path(self, step: int, suffix: str = "") -> Path:
        return self._directory / f"{step}{suffix}"

    def _finish(self, step: int, contents: str) -> None:
        """In the background: completes the checkpoint, gives it its name and drops what need not be kept."""
        self._orbax.wait_until_finished()
        if not first():
            return
        unfinished = self._path(step, WRITING)
        (unfinished / CONTENTS).write_text(contents)
        seal(unfinished)
        self._delete(step)  # there only if it was damaged
        unfinished.rename(self._path(step))
        self._rotate()

    def _rotate(self) -> None:
        """Deletes damaged checkpoints, now that an intact one is there, and those that no policy keeps."""
        for step in sorted(self._damaged):
            self._delete(step)
        infos = [self._info(step) for step in self.steps()]
        kept = self._policy.should_preserve(infos, context=PreservationContext())
        for info, keep in zip(infos, kept, strict=True):
            if not keep:
                self._delete(info.step)

    def _delete(self, step: int) -> None:
        """Deletes a checkpoint; renamed first, so that a kill leaves no half of it under its name."""
        if self._path(step).exists():
            self._path(step).rename(self._path(step, DELETING))
            shutil.rmtree(self._path(step, DELETING))
        self._damaged.discard(step)

    def _remove_leftovers(self) -> None:
        """Deletes what a killed process left unfinished; not on reading, which may see it live."""
        if first() and self._directory.exists():
            for path in self._directory.iterdir():
                if path.suffix in (WRITING, DELETING):
                    shutil.rmtree(path)

    def _info(self, step: int) -> CheckpointInfo:
        """Returns what a policy ranks by; where the contents are damaged, there is no metric."""
        path = self._path(step)
        metric = json.loads((path / CONTENTS).read_text())["metric"] if is_intact(path, CONTENTS) else None
        return CheckpointInfo(step, None if metric is None else {"metric": metric})

    def _load(self, step: int, abstract_state: Any, whole: bool) -> Restored:
        contents = json.loads((self._path(step) / CONTENTS).read_text())
        leaves = named_leaves(abstract_state)
        saved = {name: what for name, what in contents["leaves"].items() if whole or name in leaves}
        _check_architecture(step, saved, describe(leaves))
        abstract_arrays = abstract_plain_arrays(leaves)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_arrays)
        args = ocp.args.PyTreeRestore(abstract_arrays, restore_args=restore_args, partial_restore=not whole)
        arrays = self._orbax.restore(self._path(step) / STATE, args=args)
        state = to_state(arrays, abstract_state, contents["key_impls"])
        return Restored(contents["step"], state, contents["position"])

    @contextmanager
    def _explained_write_errors(self, step: int) -> Iterator[None]:
        """Turns what the file system refuses into a UserError, and frees the space of the failed write."""
        try:
            yield
        except Exception as error:
            shutil.rmtree(self._path(step, WRITING), ignore_errors=True)
            reported = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's wording
            number = int(reported[1]) if reported else getattr(error, "errno", None)
            if number is None:
                raise
            full = number in (errno.ENOSPC, errno.EDQUOT)
            problem = "disk full" if full else f"cannot write ({os.strerror(number)})"
            raise UserError(
                f"{problem}: checkpoint {step} was not written to {self._directory}, complete are "
                f"{self.steps() or 'none'}; mend that, then run the same command again"
            ) from error


def _by_layer(array: jax.Array) -> ocp.SaveArgs:
    """How an array is cut in storage: stacked matrices by layer, so that one can be read alone."""
    return ocp.SaveArgs(shard_axes=(0,) if array.ndim > 2 else ())


def _check_architecture(step: int, saved: dict[str, str], expected: dict[str, str]) -> None:
    """Raises UserError naming the first leaf in which the checkpoint and the state to restore differ."""
    differing = [name for name in sorted(saved | expected) if saved.get(name) != expected.get(name)]
    for name in differing[:1]:
        raise UserError(
            f"checkpoint {step} is of another architecture: {name} is {saved.get(name, 'absent')} in it and "
            f"{expected.get(name, 'absent')} in the config ({len(differing)} leaves differ); use the "
            "config of this run, or another run directory"
        )
