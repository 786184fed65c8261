"""The fit over experts and granularity finds the law that made the losses, and only where rows ask for it."""

import json
from pathlib import Path

import numpy as np
import pytest
from invented_sweep import ROUTING, ablation, write_runs

from moe.ablation import Ablation, Axis, Run, read_result, summarise, write_report
from moe.ablation.command import Commands
from moe.ablation.scaling import Point, Scaling, fit, scaling
from moe.ablation.scaling_plot import draw_scaling, headline
from moe.ablation.statistics import t_interval
from moe.ablation.summary import Sweep
from moe.routing import TopK

WIDTH = 1024  # so that a router is less than a hundredth of the compute
LAW = {"constant": np.log(4.0), "experts": -0.03, "granularity": -0.02}


def shapes(*pairs: tuple[int, int]) -> Axis:
    """Rows of E experts of which a token visits G, as wide together as a dense layer."""

    def row(experts: int, pieces: int) -> dict:
        chosen = TopK(k=pieces, renormalize=pieces > 1)
        return {
            "model.moe.num_experts": experts,
            "model.moe.expert_width": WIDTH // pieces,
            "model.moe.routing": chosen,
        }

    rows = {f"E{e}-G{g}": row(e, g) for e, g in pairs}
    return Axis("experts", {"dense": {"model.layers": "DD", "model.dense_width": WIDTH}} | rows)


GRID = shapes(*((e, g) for g in (1, 2, 4) for e in (4, 8, 16)))


def law(expansion: float, granularity: float) -> float:
    slope = LAW["experts"] * np.log(expansion) + LAW["granularity"] * np.log(granularity)
    return float(np.exp(LAW["constant"] + slope))


def loss(run: Run) -> float:
    model = run.experiment.model
    if not model.moe_layers:
        return 4.5
    k = model.moe.routing.experts_per_token(1)
    return law(model.moe.num_experts / k, k) * (1 + 1e-4 * (run.seed - 1))


def swept(folder: Path, sweep: Ablation) -> Sweep:
    write_runs(sweep.runs(folder), loss)
    return summarise(sweep, "", [read_result(run) for run in sweep.runs(folder)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Sweep, Path]:
    folder = tmp_path_factory.mktemp("scaling")
    sweep = swept(folder, ablation(axes=(GRID,), baseline={"experts": "dense"}))
    write_report(sweep, Commands([]), folder / "report")
    return sweep, folder / "report"


def found(sweep: Sweep) -> Scaling:
    answer = scaling(sweep)
    assert answer is not None
    return answer


def test_the_law_behind_the_losses_is_found(whole):
    answer = found(whole[0])
    assert [p.name for p in answer.points] == [name for name in GRID.choices if name != "dense"]
    assert answer.fit.constant == pytest.approx(LAW["constant"], abs=1e-3)
    assert answer.fit.of_doubling_experts.mean == pytest.approx(2 ** LAW["experts"] - 1, abs=1e-4)
    assert answer.fit.of_doubling_granularity.mean == pytest.approx(2 ** LAW["granularity"] - 1, abs=1e-4)
    assert answer.fit.explained > 0.99
    assert answer.fit.loss(8, 2) == pytest.approx(law(8, 2), rel=1e-3)
    assert answer.dense is not None
    assert answer.dense.loss.mean == pytest.approx(4.5, abs=1e-3)


def test_costs_are_those_of_the_rows(whole):
    points = {p.name: p for p in found(whole[0]).points}
    assert points["E16-G1"].total_params > points["E8-G1"].total_params
    # Alone a token reads as much of either, but for the router's columns; of a batch each visits its own.
    one, many = zip(points["E8-G1"].decode_bytes, points["E16-G1"].decode_bytes, strict=True)
    assert one[1] == pytest.approx(one[0], rel=0.02)
    assert many[1] > 1.2 * many[0]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_intervals_hold_the_law(noise):
    random = np.random.default_rng(0)
    inside = []
    for _ in range(200):
        points = []
        for e, g in [(4, 1), (8, 1), (16, 1), (4, 2), (8, 2), (16, 2), (8, 4), (16, 4)]:
            losses = tuple(law(e / g, g) * np.exp(noise * random.normal(size=2)))
            points.append(Point("", e, g, 0, t_interval(losses), losses, 0.0, ()))
        doubling = fit(points).of_doubling_experts
        inside.append(doubling.low - 1e-9 <= 2 ** LAW["experts"] - 1 <= doubling.high + 1e-9)
    assert np.mean(inside) > 0.9


def test_the_report_has_picture_table_and_numbers(whole):
    sweep, folder = whole
    answer, text = found(sweep), (folder / "report.md").read_text()
    assert "## Experts and granularity at equal active compute" in text
    assert "(scaling.png)" in text
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((folder / "results.json").read_text())["scaling"]
    assert kept["fit"]["of_doubling_experts"]["mean"] == answer.fit.of_doubling_experts.mean
    assert [p["name"] for p in kept["points"]] == [p.name for p in answer.points]
    drawn = draw_scaling(answer)
    assert len(drawn.axes) == 3
    assert headline(answer).startswith("Twice the experts: loss -2.1%; experts twice as fine: -1.4%")


@pytest.mark.parametrize(
    "axes",
    [
        (ROUTING,),  # other active compute
        (shapes((4, 1), (8, 1), (16, 1), (32, 1), (64, 1)),),  # one granularity
        (shapes((4, 1), (8, 2), (8, 1)),),  # too few
    ],
)
def test_other_sweeps_have_no_such_section(tmp_path, axes):
    sweep = swept(tmp_path, ablation(axes=axes))
    assert scaling(sweep) is None
    write_report(sweep, Commands([]), tmp_path / "report")
    assert not (tmp_path / "report" / "scaling.png").exists()
    assert "Experts and granularity" not in (tmp_path / "report" / "report.md").read_text()
