"""Pages of made-up results: what stands in which cell."""

import pytest

from benchmarks.gpu.figures import KNOWN
from benchmarks.gpu.report import grouped_matmul_page, moe_layer_page
from benchmarks.gpu.summary import grouped_matmul_summary, moe_layer_summary, with_summary

HEAD = {
    "date": "2026-01-02",
    "commit": "abc1234",
    "modified": True,
    "hardware": {"processor": "some processor"},
    "gpu": {"name": "NVIDIA H100", "driver_version": "580"},
    "python": "3.12",
    "rounds": 3,
}


def record(program, case, routing, passed, tera, **more):
    """Of one second a call, with one round that is off."""
    seconds = [1.0, 1.0, 9.0]
    keys = {"program": program, "case": case, "routing": routing, "pass": passed}
    return keys | {"flops": tera * 1e12, "seconds": seconds} | more


def cells_of(page, *begin):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    return [row for row in rows if row[: len(begin)] == list(begin)]


def test_grouped_matmul_page():
    case = "OLMoE up"
    records = [
        record("Switchyard", case, "uniform", "forward", 600, error=1.5e-3),
        record("XLA", case, "dense", "forward", 500),
        record("torch.mm", case, "dense", "forward", 800),
        record("torch.bmm", case, "uniform", "forward", 750),
        record("torch._grouped_mm", case, "uniform", "forward", 400, error=2e-3),
        record("torch.mm", "dense 8192", "dense", "forward", 900),
        {"program": "tokamax", "case": case, "pass": "forward", "failed": "Error: why"},
    ]
    page = grouped_matmul_page(HEAD | {"programs": [{"records": records, "versions": {"jax": "1.2"}}]})
    assert "commit abc1234 and uncommitted changes; python 3.12, jax 1.2" in page
    uniform, zipf = cells_of(page, f"{case}, forward")
    assert uniform[1:] == ["600", "750", "400", "800", "75%", "80%", "150%", "67%", "1.5e-03"]
    assert zipf[1:] == ["–", "750", "–", "800", "–", "–", "–", "–", "–"]
    assert "- tokamax, OLMoE up, forward: Error: why" in page


def test_moe_layer_page():
    gibi = 2**30
    costs = {"argument_bytes": gibi, "working_bytes": 2 * gibi}
    errors = {"saved_bytes": gibi // 2, "error": {"y": 1e-3, "x": 2e-3, "w": 3e-3}}
    records = [
        record("Switchyard", "OLMoE", "uniform", "forward", 500, **costs),
        record("Switchyard", "OLMoE", "Zipf", "forward", 450, **costs),
        record("Switchyard", "OLMoE", "uniform", "forward + backward", 400, **costs, **errors),
        record("transformers", "OLMoE", "uniform", "forward", 250, **costs),
        record("torch.bmm", "OLMoE up", "uniform", "forward", 800),
        record("torch.bmm", "OLMoE down", "uniform", "forward", 400),
        record("torch.mm", "dense 8192", "dense", "forward", 1000),
    ]
    page = moe_layer_page(HEAD | {"programs": [{"records": records}]})
    forward, both = cells_of(page, "OLMoE", "Switchyard")
    # The products alone: 800 + 400 operations in two seconds.
    assert forward[2:] == ["500", "450", "0.90", "", "", "83%", "50%", "3.00"]
    assert both[2:] == ["400", "–", "–", "", "", "–", "40%", "3.00", "0.50", "1.0e-03", "2.0e-03", "3.0e-03"]
    assert cells_of(page, "OLMoE", "transformers")[0][2:7] == ["250", "–", "–", "2.00", "–"]


@pytest.mark.parametrize("ran", [False, True])
def test_known_figures_stand_in_for_a_peer_that_did_not_run(ran):
    shape = "fine-grained 7B"
    costs = {"argument_bytes": 0, "working_bytes": 0}
    records = [record("Switchyard", shape, "uniform", "forward", 500, **costs)]
    records += [record("SonicMoE", shape, "uniform", "forward", 300, **costs)] if ran else []
    page = moe_layer_page(HEAD | {"programs": [{"records": records}]})
    shown = [label for label in KNOWN if cells_of(page.split("## Forward + backward")[0], shape, label)]
    assert shown == ([] if ran else list(KNOWN))


def test_every_row_has_the_columns_of_its_table():
    costs = {"argument_bytes": 0, "working_bytes": None}
    records = [
        record("Switchyard", "OLMoE", "uniform", "forward", 500, **costs),
        record("torch.bmm", "OLMoE up", "uniform", "forward", 800),
    ]
    page = moe_layer_page(HEAD | {"programs": [{"records": records}]})
    for table in page.split("## ")[1:3]:
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_summaries():
    costs = {"argument_bytes": 0, "working_bytes": 0}
    layer = [
        record("Switchyard", "OLMoE", "uniform", "forward", 600, **costs),
        record("Switchyard", "OLMoE", "Zipf", "forward", 540, **costs),
        record("SonicMoE", "OLMoE", "uniform", "forward", 500, **costs),
        record("SonicMoE", "OLMoE", "Zipf", "forward", 450, **costs),
        record("torch.mm", "dense 8192", "dense", "forward", 800),
    ]
    (cells,) = cells_of(moe_layer_summary(HEAD | {"programs": [{"records": layer}]}), "OLMoE", "forward")
    assert cells[2:] == ["600", "0.90", "1.20", "1.20", "–", "–", "–", "75%"]

    product = [
        record("Switchyard", "OLMoE up", "Zipf", "weight gradient", 600),
        record("torch._grouped_mm", "OLMoE up", "Zipf", "weight gradient", 500),
        record("XLA", "OLMoE up", "dense", "forward", 800),
    ]
    table = grouped_matmul_summary(HEAD | {"programs": [{"records": product}]})
    (cells,) = cells_of(table, "OLMoE up", "Zipf")
    assert cells[2:] == ["–, –, –", "–, –, –", "600, 75%, 1.20"]


def test_a_summary_replaces_the_last_one_of_its_own_run():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    fresh = with_summary(page, "one", "new")
    assert fresh == page.replace("old\n", "\nnew\n")
    assert with_summary(fresh, "one", "new") == fresh
    assert with_summary(page, "three", "new") == page
