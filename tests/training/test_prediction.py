"""`eval.py ... --compute` as a user runs it, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

import eval as command
from moe.config import load_config, to_json
from moe.errors import UserError
from moe.experiment import Experiment

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart.py")


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    command.main()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_is_enough(here, monkeypatch, capsys):
    run(
        monkeypatch, CONFIG, "--compute", "--hardware", "h100,cpu", "--price", "h100=2", "--batches", "1", "9"
    )
    found = json.loads((here / "runs/quickstart/report/compute.json").read_text())
    assert list(found["hardware"]) == ["h100", "cpu"]
    assert [w["name"] for w in found["workloads"]] == ["train step", "prefill 128", "decode 1", "decode 9"]
    assert (found["total_params"], found["active_params"]) == (4_400_768, 1_648_256)
    times = {name: chip["times"]["decode 9"] for name, chip in found["hardware"].items()}
    assert times["h100"]["seconds"] < times["cpu"]["seconds"]
    assert times["h100"]["dollars_per_million_tokens"] > 0
    assert times["cpu"]["dollars_per_million_tokens"] is None
    assert (here / "runs/quickstart/report/compute.png").read_bytes().startswith(b"\x89PNG")
    assert "4,400,768 parameters" in " ".join(capsys.readouterr().out.split())


def test_a_run_brings_its_load(here, monkeypatch):
    run_directory = here / "runs" / "quickstart"
    (run_directory / "report").mkdir(parents=True)
    experiment = load_config(CONFIG, Experiment)[0]
    (run_directory / "config.json").write_text(to_json(experiment))
    experts = experiment.model.moe.num_experts
    collapsed = [[experts / 2.0] * 2 + [0.0] * (experts - 2)] * experiment.model.moe_layers
    (run_directory / "report" / "eval.json").write_text(json.dumps({"total": {"load": collapsed}}))
    run(monkeypatch, "runs/quickstart", "--compute", "--hardware", "h100", "--batches", "64")
    found = json.loads((run_directory / "report" / "compute.json").read_text())
    assert found["load"] == "measured"
    assert found["decode"][0]["experts_touched"] == 2.0


def test_a_model_that_looks_ahead_is_not_served(here, monkeypatch, capsys):
    run(monkeypatch, CONFIG, "--compute", "--hardware", "h100", "--model.layers", "MmMm")
    found = json.loads((here / "runs/quickstart/report/compute.json").read_text())
    assert [w["name"] for w in found["workloads"]] == ["train step"]
    assert "no serving" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--hardware", "h100,h300"), "--hardware h100,h300: no figures for 'h300'; choose from a100"),
        (("--price", "h100"), "--price h100: 'h100' is no price"),
        (("--price", "h100=-1"), "--price h100=-1: 'h100=-1' must be"),
        (("--price", "z=1"), "--price z=1: 'z=1' must be one of"),
        (("--batches", "0"), "batches=(0,) must be"),
        (("--context", "-1"), "context=-1 must be at least 0"),
        (("--weights", "int3"), "'int3' is no format; say int8"),
        (("--weights", "int4-24"), "group_size=24 does not divide the 128 inputs"),
        (("--cache", "int4"), "--cache: expected"),
        (("--hardwear", "h100"), "unknown field --hardwear; did you mean --hardware?"),
        (("--model.moe.num-experts", "0"), "model.moe.num_experts=0"),
    ],
)
def test_what_cannot_be_is_one_line(here, monkeypatch, arguments, named):
    with pytest.raises(UserError) as refused:
        run(monkeypatch, CONFIG, "--compute", *arguments)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(here.iterdir())


def test_a_folder_without_a_run_and_a_broken_evaluation_are_refused(here, monkeypatch):
    with pytest.raises(UserError, match="holds no run"):
        run(monkeypatch, str(here), "--compute")
    (here / "config.json").write_text(to_json(load_config(CONFIG, Experiment)[0]))
    (here / "report").mkdir()
    (here / "report" / "eval.json").write_text("{}")
    with pytest.raises(UserError, match=r"eval\.json cannot be read"):
        run(monkeypatch, str(here), "--compute")
