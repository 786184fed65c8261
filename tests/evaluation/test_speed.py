"""`eval.py ... --speed` as a user runs it, the forecast by hand, and what is said to bind."""

import json
import sys
from pathlib import Path

import pytest

import eval as command
from moe.analysis.cost.forecast import LAUNCHES, PASSES, Rates, bytes_between_products, forecast
from moe.analysis.cost.passes import SCORES, Work
from moe.errors import UserError
from moe.evaluation.speed import Timing, as_dict, present_hardware
from moe.nn import AttentionConfig, TransformerConfig

TINY = str(Path(__file__).parents[1] / "end_to_end" / "tiny.py")
RATES = Rates(products=100.0, attention=50.0, bandwidth=10.0, kernel=0.5)
PARTS = {"experts": Work(1000, 10), "head": Work(10, 50), SCORES: Work(100, 1)}


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    command.main()


def test_a_forecast_is_each_part_at_its_rate_and_the_kernels():
    found = forecast(PARTS, RATES, passes=20.0, kernels=4)
    assert found == {"experts": 10.0, "head": 5.0, SCORES: 2.0, PASSES: 2.0, LAUNCHES: 2.0}


def test_bytes_between_products_by_hand():
    attention = AttentionConfig(heads=4, kv_heads=2, head_width=16)
    config = TransformerConfig(vocab_size=100, width=64, layers="DD", attention=attention)
    normed, turned = 5 * 64, 2 * (4 + 2) * 16
    assert bytes_between_products(config, 3, training=False) == 3 * (normed + turned) * 2 * 2
    assert bytes_between_products(config, 3, training=True) == 3 * ((normed + turned) * 5 * 2 + 10 * 100)


def timing(seconds: list[float], profile: dict | None, input_seconds: float | None = None) -> Timing:
    return Timing("w", 1, 8, PARTS, 20.0, 4, seconds, profile, input_seconds)


def told(*arguments) -> dict:
    return as_dict(timing(*arguments), RATES, present_hardware(RATES))


def test_times_are_percentiles_and_shares_of_what_the_device_can_do():
    found = told([20.0, 21.0, 40.0], None)
    assert (found["median"], found["predicted"], found["error"]) == (21.0, 21.0, 0.0)
    assert 21 < found["p90"] < found["p99"] < 40
    assert found["mfu"] == pytest.approx(1110 / 21 / 100)
    assert found["bandwidth_utilisation"] == pytest.approx(61 / 21 / 10)
    assert found["bound_seconds"] == pytest.approx(10 + 5 + 1)
    assert found["tokens_per_second"] == pytest.approx(8 / 21)


def test_what_binds_without_a_profile_is_what_the_forecast_says():
    found = told([20.0], None)
    assert found["bound"] == "compute"
    # 12 s of products and scores, 7 s of bytes, 2 s in which kernels are launched.
    assert found["shares"] == pytest.approx(
        {"compute": 12 / 21, "memory": 7 / 21, "communication": 0.0, "input": 2 / 21}
    )


@pytest.mark.parametrize(
    ("idle", "sent", "bound"), [(1.0, 7.0, "communication"), (8.0, 1.0, "input"), (1.0, 1.0, "compute")]
)
def test_what_binds_is_read_off_the_profile(idle, sent, bound):
    profile = {"span": 10.0, "idle": idle, "busy": 10.0 - idle, "kinds": {"communication": sent}}
    found = told([10.0], profile)
    assert found["bound"] == bound
    assert found["shares"]["input"] == pytest.approx(idle / 10)
    assert found["shares"]["communication"] == pytest.approx(sent / 10)
    assert sum(found["shares"].values()) == pytest.approx(1)


def test_a_step_that_waits_for_its_batch_is_bound_by_input():
    assert told([1.0, 2.0], None, 1.5)["bound"] == "compute"
    assert told([1.0, 2.0], None, 2.5)["bound"] == "input"


def test_a_config_is_measured_with_random_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("--calls", "2", "--batches", "2", "--quantize", "int8", "--cache", "int8")
    run(monkeypatch, TINY, "--speed", "--profiled", "1", "--model.layers", "M", *arguments)
    found = json.loads((tmp_path / "runs/tiny/report/speed.json").read_text())
    names = [w["name"] for w in found["workloads"]]
    assert names == ["train step", "prefill 16", "decode 2"]
    assert (found["weights"], found["cache"], found["context"], found["devices"]) == ("int8", "int8", 32, 8)
    for w in found["workloads"]:
        assert sum(w["predicted_by_part"].values()) == pytest.approx(w["predicted"])
        assert sum(w["shares"].values()) == pytest.approx(1)
        assert w["kernels"] > 50
        profile = w["profile"]
        assert "failed" not in profile
        assert sum(profile["kinds"].values()) == pytest.approx(profile["busy"])
        assert sum(profile["parts"].values()) == pytest.approx(profile["busy"])
        assert {"experts", "attention"} <= set(profile["parts"])
    assert "communication" in found["workloads"][0]["profile"]["kinds"]  # gradients of eight devices
    shown = " ".join(capsys.readouterr().out.split())
    assert "where the time of decode 2 goes" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--batches", "0"), "batches=(0,) must be"),
        (("--prompt", "64"), "prompt=64 is longer than the context of 32"),
        (("--calls", "0"), "calls=0 must be at least 1"),
        (("--quantize", "int3"), "'int3' is no format"),
        (("--skip-train", "--skip-serving"), "leave nothing to measure"),
        (("--model.layers", "MmM", "--skip-train"), "model.layers"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        run(monkeypatch, TINY, "--speed", *arguments)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
