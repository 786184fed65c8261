"""Two models side by side: verdicts by hand, and the report that is made of them."""

import json
import math

import numpy as np
import pytest

from moe.evaluation.comparison import Answers, cost, quality, time_of
from moe.evaluation.comparison_report import text, write


def answers(nll: list[float]) -> Answers:
    return Answers(np.array(nll), np.full(len(nll), 10.0), np.full(len(nll), 20.0))


NOISE = np.random.default_rng(0).normal(0, 0.3, 50)
BASE = answers((8 + 2 * np.random.default_rng(1).random(50)).tolist())


def test_a_slice_is_worse_where_the_paired_interval_says_so():
    worse = quality(BASE, answers((BASE.nll + 0.2 + NOISE).tolist()), True)
    assert worse["difference"] == pytest.approx((0.2 + NOISE.mean()) / math.log(2) / 20)
    assert worse["low"] < worse["difference"] < worse["high"]
    assert (worse["verdict"], worse["sequences"]) == ("worse", 50)
    # The spread of the sequences is ten times what tells the two apart, and stays out of it.
    assert worse["high"] - worse["low"] < 0.2 * BASE.nll.std() / math.log(2)
    assert quality(BASE, answers((BASE.nll - 0.2 + NOISE).tolist()), True)["verdict"] == "better"
    assert quality(BASE, answers((BASE.nll + NOISE - NOISE.mean()).tolist()), True)["verdict"] == "same"


def test_without_the_same_sequences_nothing_is_tested():
    found = quality(BASE, answers([30.0] * 7), False)
    assert found["verdict"] == "not tested" and math.isnan(found["low"])
    assert found["after"] == pytest.approx(30 / math.log(2) / 20)
    assert found["loss_after"] == pytest.approx(3.0)


@pytest.mark.parametrize(("after", "verdict"), [(100.9, "same"), (102.0, "worse"), (98.0, "better")])
def test_costs(after, verdict):
    found = cost(("bytes", 100.0), ("bytes", after))
    assert (found["verdict"], found["ratio"]) == (verdict, pytest.approx(after / 100))


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0] * 9, [1.04] * 9, "same"),
        ([1.0] * 9, [1.06] * 9, "worse"),
        ([1.0] * 9, [0.9] * 9, "better"),
        ([1.0, 1.0, 1.0, 1.5, 1.5], [1.2] * 5, "same"),  # within what the baseline itself shows
    ],
)
def test_times(before, after, verdict):
    found = time_of(("decode 8", 8, before), ("decode 8", 8, after))
    assert found["verdict"] == verdict
    assert found["tokens_per_second_after"] == pytest.approx(8 / np.median(after))


def test_the_report_is_one_file_that_marks_what_is_worse(tmp_path):
    q = quality(BASE, answers((BASE.nll + 1).tolist()), True)
    timed = time_of(("decode 8", 8, [1.0] * 9), ("decode 8", 8, [2.0] * 9))
    found = {
        "sides": [{"name": n, "step": 3, "tokens_trained": 9} for n in ("a/b", "c in int8")],
        "rule": "rule",
        "same_data": True,
        "slices": {"code": q, "prose": quality(BASE, answers([30.0]), False)},
        "costs": [cost(("bytes", 4.0), ("bytes", 1.0))],
        "speed": [timed],
        "regressions": ["bits per byte of code", "decode 8"],
    }
    numbers, page = write(tmp_path / "report", found)
    assert (numbers.name, page.name) == ("compare-a-b-int8.json", "compare-a-b-int8.html")
    kept = json.loads(numbers.read_text())
    assert kept["slices"]["prose"]["low"] is None
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 2 and 'src="quality.png"' not in html
    assert "Regressions: bits per byte of code, decode 8." in html
    assert html.count("WORSE") == 2
    lines = text(found | {"speed": "left out"}).splitlines()
    assert "Not measured: left out." in lines
    (code,) = (line for line in lines if line.startswith("| code"))
    assert code.endswith("| WORSE |")
