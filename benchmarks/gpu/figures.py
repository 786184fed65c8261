"""A GPU benchmark's records, and the rates that its tables compare."""

from collections.abc import Iterable
from statistics import median
from typing import Any

OURS = "Switchyard"
DENSE, PRODUCTS = ("XLA", "torch.mm"), ("XLA", "torch.mm", "torch.bmm")
PEAK = 989e12  # dense bfloat16 operations a second of an H100 SXM, by its datasheet

# TF/s of SonicMoE by (shape, pass), for where it was not measured in the run at hand.
KNOWN = {
    "SonicMoE, published (2512.14080)": {
        ("fine-grained 7B", "forward"): "365",
        ("fine-grained 7B", "forward + backward"): "406",
    },
    "SonicMoE 0.1.2, another run on an H100": {
        ("OLMoE", "forward"): "526–538",
        ("OLMoE", "forward + backward"): "521–543",
        ("Qwen3-30B-A3B", "forward"): "422–500",
        ("Qwen3-30B-A3B", "forward + backward"): "476–480",
        ("Mixtral 8x7B", "forward"): "627–635",
        ("Mixtral 8x7B", "forward + backward"): "555–577",
        ("fine-grained 7B", "forward"): "206",
        ("fine-grained 7B", "forward + backward"): "281",
    },
}


class Figures:
    """The records of a run, found by what they measure."""

    def __init__(self, results: dict[str, Any]):
        everything = [record for told in results["programs"] for record in told["records"]]
        self.records = [record for record in everything if "failed" not in record]
        self.failed = [record for record in everything if "failed" in record]

    def find(self, program: str, case: str, routing: str, passed: str) -> dict[str, Any] | None:
        """The record, if the run has it."""
        wanted = (program, case, routing, passed)
        keys = ("program", "case", "routing", "pass")
        return next((r for r in self.records if tuple(r[key] for key in keys) == wanted), None)

    def rate(self, program: str, case: str, routing: str, passed: str) -> float | None:
        """Useful operations a second."""
        record = self.find(program, case, routing, passed)
        return rate(record) if record else None

    def names(self, key: str, *, leave_out: Iterable[str] = ()) -> list[str]:
        """What the records say under `key`, each once, in their order."""
        return [name for name in dict.fromkeys(r[key] for r in self.records) if name not in leave_out]


def rate(record: dict[str, Any]) -> float:
    """Useful operations a second, at the median over rounds."""
    return record["flops"] / median(record["seconds"])


def dense_rates(figures: Figures) -> dict[str, float]:
    """The faster dense product of each case."""
    best: dict[str, float] = {}
    for record in figures.records:
        if record["routing"] == "dense":
            best[record["case"]] = max(best.get(record["case"], 0), rate(record))
    return best


def square_rate(figures: Figures) -> float | None:
    """The faster dense product of 8192³."""
    return dense_rates(figures).get("dense 8192")


def bmm_rate(figures: Figures, shape: str, passed: str) -> float | None:
    """Operations a second of a layer's products alone; None unless all were measured."""
    passes = ("forward",) if passed == "forward" else ("forward", "data gradient", "weight gradient")
    found = [
        figures.find("torch.bmm", f"{shape} {side}", "uniform", each)
        for side in ("up", "down")
        for each in passes
    ]
    records = [record for record in found if record]
    if len(records) < len(found):
        return None
    return sum(r["flops"] for r in records) / sum(median(r["seconds"]) for r in records)
