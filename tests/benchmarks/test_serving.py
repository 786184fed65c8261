"""Serving on a CPU: what every engine is given, and the page about it."""

import json
from dataclasses import replace

import pytest

from benchmarks.serving import model
from benchmarks.serving.report import markdown
from benchmarks.serving_cpu import ENGINES
from benchmarks.worker import ROOT

GIVEN = [(engine.exported, format) for engine in ENGINES if engine.exported for format in engine.formats]
TINY = replace(
    model.MODEL,
    vocab_size=300,
    width=64,
    layers="M",
    attention=replace(model.MODEL.attention, heads=2, kv_heads=1, head_width=32),
    moe=replace(model.MODEL.moe, num_experts=4, expert_width=64),
)


@pytest.mark.parametrize(("kind", "precision"), GIVEN)
def test_every_engine_is_given_something(monkeypatch, tmp_path, one_device, kind, precision):
    monkeypatch.setattr(model, "MODEL", TINY)
    written = model.write(tmp_path, kind, precision)
    files = list(written.iterdir()) if written.is_dir() else [written]
    assert sum(file.stat().st_size for file in files) > 10_000


def test_the_page_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "serving_cpu.json").read_text())
    assert markdown(results) == (ROOT / "docs" / "results" / "serving_cpu.md").read_text()
