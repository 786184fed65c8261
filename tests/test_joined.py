"""Processes that join: they agree, and end together however one of them ends."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe.errors import UNFINISHED, UserError
from moe.processes import joined


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run(count: int, body: str, missing: int = 0) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of processes that run `body`, joined; `missing` of them never start."""
    program = "\n".join(
        [
            "import os, signal, time",
            "import jax",
            "from moe.errors import UserError, run_main",
            "from moe.processes import first, first_decides, joined",
            "def main():",
            f"    with joined(start_seconds={2 if missing else 60}):",
            *(f"        {line}" for line in body.splitlines()),
            "run_main(main)",
        ]
    )
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[1],
            env=os.environ
            | {"XLA_FLAGS": "", "JAX_COORDINATOR_ADDRESS": address}
            | {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count - missing)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *told) for process, told in zip(processes, ended, strict=True)]


def test_the_first_process_decides_for_all_and_an_error_in_another_ends_all():
    first, second, third = run(
        3,
        """index = jax.process_index()
decided = [first_decides(lambda: ["of", index]), first_decides(lambda: index + 5)]
assert decided == [["of", 0], 5]
print("told by", index, flush=True)
if index == 2:
    raise UserError("no text on this machine")
time.sleep(100)""",
    )
    said = r"error: process 2 of 3 on \S+ ended: no text on this machine\n"
    assert first[:2] == (2, "told by 0\n")
    assert second[:2] == (2, "")
    assert third == (2, "", "error: no text on this machine\n")
    assert re.fullmatch(said, first[2])
    assert re.search(said, second[2])


def test_the_first_process_is_missed_too():
    first, second = run(2, "time.sleep(1)\nif first(): os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(100)")
    assert (first[0], second[0]) == (-9, UNFINISHED)
    assert re.match(r"error: process 0 of 2 on localhost is gone, ", second[2].splitlines()[-1])


def test_processes_that_do_not_come_are_not_awaited_for_ever():
    [first] = run(2, "pass", missing=1)
    assert first[:2] == (2, "")
    assert re.match(r"error: process 0 waited 2 s to meet all others at localhost:\d+; start ", first[2])


@pytest.mark.parametrize(
    ("address", "count", "index", "named"),
    [
        ("", "2", "0", "JAX_COORDINATOR_ADDRESS=''"),
        ("somewhere", "2", "0", "JAX_COORDINATOR_ADDRESS='somewhere': set it to HOST:PORT"),
        ("somewhere:80", "2", "", "JAX_PROCESS_ID='': set it to a number"),
        ("somewhere:80", "two", "0", "JAX_NUM_PROCESSES='two': set it to a number"),
        ("somewhere:80", "2", "2", "JAX_PROCESS_ID=2: the JAX_NUM_PROCESSES=2 processes count from 0"),
    ],
)
def test_variables_that_are_no_good_are_named(monkeypatch, address, count, index, named):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    monkeypatch.setenv("JAX_NUM_PROCESSES", count)
    monkeypatch.setenv("JAX_PROCESS_ID", index)
    with pytest.raises(UserError, match=f"^{re.escape(named)}"), joined():
        pass


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        with pytest.raises(UserError, match=f"^JAX_COORDINATOR_ADDRESS={address}: Address already"), joined():
            pass


@pytest.mark.parametrize("variables", [{}, {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}])
def test_one_process_joins_nobody(monkeypatch, variables, capsys):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "somewhere:80")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with joined():
        print("told")
    assert capsys.readouterr().out == "told\n"
