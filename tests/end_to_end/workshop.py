"""A folder with a small corpus, in which train.py and eval.py run as a user runs them."""

import contextlib
import hashlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moe.checkpoint import CheckpointStore, Restored
from moe.mesh import MeshConfig, make_mesh
from moe.named_arrays import named_leaves
from moe.nn import structure
from moe.training.run_directory import read_experiment
from moe.training.state import abstract_state

ROOT = Path(__file__).parents[2]
TINY = str(Path(__file__).with_name("tiny.py"))


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def opened(tmp_path_factory) -> Iterator["Workshop"]:
    """A workshop in which each program is compiled once, whichever process needs it first."""
    compiled = str(tmp_path_factory.getbasetemp() / "compiled")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    sigterm = signal.getsignal(signal.SIGTERM)
    yield Workshop(tmp_path_factory.mktemp("workshop"), compiled)
    signal.signal(signal.SIGTERM, sigterm)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


class Workshop:
    """Runs commands in a folder of its own."""

    def __init__(self, folder: Path, compiled: str):
        self.folder, self.compiled = folder, compiled
        self.runs = folder / "runs"
        for name, words in (("prose", "the cat sat on a mat and dreamt\n"), ("code", "x = f(y)\nreturn x\n")):
            choose = random.Random(name)
            text = " ".join(choose.choices(words.split(" "), k=8000))
            (folder / "texts" / name).mkdir(parents=True)
            (folder / "texts" / name / "a.txt").write_text(text)

    def copy(self, run: str, name: str) -> Path:
        """A run as it is now, under another name."""
        shutil.copytree(self.runs / run, self.runs / name)
        config = self.runs / name / "config.json"
        config.write_text(config.read_text().replace(f'"name": "{run}"', f'"name": "{name}"'))
        return self.runs / name

    def start(
        self, script: str, *arguments: str, devices: int = 1, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a command in a process of its own, on simulated devices."""
        return self.start_program(
            sys.executable, str(ROOT / script), *arguments, devices=devices, **environment
        )

    def start_program(self, *command: str, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
        """Start any program, such as one that starts commands."""
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=os.environ
            | {
                "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
                "JAX_COMPILATION_CACHE_DIR": self.compiled,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONUNBUFFERED": "1",
            }
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, devices: int = 1) -> Ended:
        """Run a command in a process of its own to its end."""
        process = self.start(script, *arguments, devices=devices)
        out, err = process.communicate(timeout=300)
        return Ended(process.returncode, out, err)

    def call(self, script: str, *arguments: str) -> Ended:
        """Run a command in this process, which has 8 simulated devices: quick where nothing is compiled."""
        out, err = io.StringIO(), io.StringIO()
        given, sys.argv = sys.argv, [script, *arguments]
        try:
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                jax.set_mesh(make_mesh(MeshConfig())),  # whatever mesh the command sets ends with it
            ):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            return Ended(int(ended.code or 0), out.getvalue(), err.getvalue())
        finally:
            sys.argv = given
        raise AssertionError("a command ends with an exit code")


def checkpoint(run: Path, step: int) -> Restored:
    """A run's checkpoint, on one device."""
    experiment = read_experiment(run)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        transformation = experiment.optimizer.build(structure(experiment.model)[1], experiment.train.steps)
        average = experiment.train.average_decay > 0
        state = abstract_state(experiment.model, transformation, average=average)
        with CheckpointStore(run / "checkpoints", experiment.checkpoints) as store:
            return store.restore_step(step, state)


def lines(run: Path, *, speed: bool = False) -> list[dict]:
    """What metrics.jsonl holds; speeds left out unless asked for."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if speed or not k.startswith("speed/")} for line in found]


def assert_same_run(run: Path, whole: Path) -> None:
    """Two runs ended with the same bits in state and data position, and logged the same."""
    steps = read_experiment(run).train.steps
    (_, state, position), (_, expected, expected_position) = checkpoint(run, steps), checkpoint(whole, steps)
    leaves, expected_leaves = named_leaves(state), named_leaves(expected)
    assert leaves.keys() == expected_leaves.keys()
    differing = [
        k for k, v in leaves.items() if np.asarray(v).tobytes() != np.asarray(expected_leaves[k]).tobytes()
    ]
    assert not differing
    assert position == expected_position
    assert lines(run) == lines(whole)


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file in a folder by its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
