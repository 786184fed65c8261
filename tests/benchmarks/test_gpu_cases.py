"""Measured programs that fail, one way or another, and the timing of calls."""

import time

from benchmarks.gpu.cases import Program, attempt, measure
from benchmarks.gpu.timing import LEAST_CALLS, seconds_of_rounds

SCRIPT = """
import os
from benchmarks.gpu.cases import serve_cases

def start(task):
    def measure(case):
        yield {"value": task["scale"] * case["value"]}
        if case["value"] == 2:
            raise ValueError("two is bad")
        if case["value"] == 3:
            os._exit(1)
    return {"versions": {"thing": "1"}}, measure

serve_cases(start)
"""


def run(tmp_path, script, values, limit=60.0):
    path = tmp_path / "program.py"
    path.write_text(script)
    cases = [{"name": f"case {value}", "value": value} for value in values]
    program = Program("thing", str(path), task={"scale": 10})
    return measure(program, cases, limit=30, deadline=time.monotonic() + limit)


def test_a_failing_case_keeps_its_records_and_the_others(tmp_path):
    told = run(tmp_path, SCRIPT, [1, 2, 3, 4])
    assert told["versions"] == {"thing": "1"}
    records = told["records"]
    assert [(r["case"], r.get("value")) for r in records if "failed" not in r] == [
        ("case 1", 10),
        ("case 2", 20),
        ("case 4", 40),
    ]
    failed = {r["case"]: r["failed"] for r in records if "failed" in r}
    assert failed.keys() == {"case 2", "case 3"}
    assert failed["case 2"] == "ValueError: two is bad"


def test_a_program_that_cannot_start_says_why_for_every_case(tmp_path):
    told = run(tmp_path, "import a_module_that_is_not_there\n", [1, 2])
    assert len(told["records"]) == 2
    assert all("a_module_that_is_not_there" in record["failed"] for record in told["records"])


def test_nothing_begins_after_the_deadline(tmp_path):
    told = run(tmp_path, SCRIPT, [1], limit=0)
    assert [record["failed"] for record in told["records"]] == ["no time was left"]


def test_attempt_says_of_what_the_error_is():
    def records():
        yield {"value": 1}
        raise RuntimeError("first line\nsecond line")

    assert list(attempt(records, **{"pass": "forward"})) == [
        {"value": 1},
        {"pass": "forward", "failed": "RuntimeError: first line"},
    ]


def test_every_round_waits_once_for_many_calls():
    events = []

    def call():
        events.append("call")
        time.sleep(0.005)

    seconds = seconds_of_rounds(call, lambda _: events.append("wait"), rounds=2)
    assert len(seconds) == 2
    assert all(each >= 0.005 for each in seconds)
    calls_of_waits = [len(part) for part in "".join(event[0] for event in events).split("w")]
    warm_up, guess, *rounds, rest = calls_of_waits
    assert (warm_up, guess, rest) == (1, 3, 0)
    assert rounds == [LEAST_CALLS] * 2
