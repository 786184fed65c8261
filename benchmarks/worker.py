"""A measured program in a process of its own: it works when asked and waits, idle, while another is measured.

The one side (`Worker`) writes a number of repetitions in a line of its own, the other (`serve`) answers with
a line of JSON. Standard library only: peers import this file in their environments.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent


class WorkerError(Exception):
    """The program failed or took too long; the message is one line."""


class Worker:
    """The measuring side. A context manager, which ends the process.

    Args:
        python: interpreter of the program's environment.
        script: the program, from the root of the repository.
        task: what it should do, handed over as JSON.
        limit: seconds that the start, warm-up included, may take.
        path: folders with packages that its environment lacks.
        environment: variables for it besides this process's own.
    """

    def __init__(
        self,
        python: Path,
        script: str,
        task: Mapping[str, Any],
        limit: float = 600,
        *,
        path: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in __exit__
        self._process = subprocess.Popen(
            [python, ROOT / script, json.dumps(task)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))),
                **(environment or {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.ready = self._answer(limit)
        except WorkerError:
            self.__exit__()
            raise

    def ask(self, repetitions: int, limit: float = 600) -> dict[str, Any]:
        """Let it work; what it measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{repetitions}\n")
        self._process.stdin.flush()
        return self._answer(limit)

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        alarm = threading.Timer(limit, self._process.kill)
        alarm.start()
        line = self._process.stdout.readline()
        alarm.cancel()
        if not line:
            raise WorkerError(self._last_words(limit))
        return json.loads(line)

    def _last_words(self, limit: float) -> str:
        self._process.wait()
        if self._process.returncode == -9:
            return f"stopped: out of memory, or longer than {limit:.0f} s"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


Task = dict[str, Any]
Work = Callable[[int], dict[str, Any]]


def serve(prepare: Callable[[Task], tuple[dict[str, Any], Work]]) -> None:
    """The measured side: prepare the task, say so, then answer every request until the other side is gone.

    Args:
        prepare: from the task to what is to be told once (`Worker.ready`), and the work of as many
            repetitions as are asked for.
    """
    # From here on stdout belongs to the answers; what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready, work = prepare(json.loads(sys.argv[1]))
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(work(int(line)) | {"peak_bytes": peak_bytes()}), file=answers, flush=True)


def seconds_of(step: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peak_bytes() -> int:
    """The most memory that this process has held, by Linux' own account.

    Not `getrusage`, whose figure takes over that of the process which started this one.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
