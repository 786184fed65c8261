"""The report of a sweep: one text, as Markdown with pictures beside it and as one HTML file.

runs/SWEEP/report/index.html    pictures inside; can be sent as it is
runs/SWEEP/report/report.md     the same, with the PNG files
runs/SWEEP/report/results.json  every number, for each seed too
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe.ablation.command import Commands
from moe.ablation.plots import draw
from moe.ablation.scaling import scaling
from moe.ablation.summary import RowSummary, Sweep
from moe.ablation.text import report_text
from moe.page import finite, html_page


def write_report(sweep: Sweep, commands: Commands, folder: Path) -> Path:
    """Write the report; each file whole or not at all.

    Returns:
        The HTML file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(report_text(sweep, commands, draw(sweep, folder)))
    pictures = {picture.name: picture.read_bytes() for picture in folder.glob("*.png")}
    for name, contents in (
        ("results.json", json.dumps(as_dict(sweep), indent=1) + "\n"),
        ("report.md", text),
        ("index.html", html_page(sweep.ablation.name, text, pictures)),
    ):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(contents, encoding="utf-8")
        temporary.replace(folder / name)
    return folder / "index.html"


def as_dict(sweep: Sweep) -> dict[str, Any]:
    """Every number of the report, as JSON holds it; null where there is none."""

    def row(summary: RowSummary) -> dict[str, Any]:
        runs = {
            str(result.run.seed): {
                "directory": str(result.run.directory),
                "status": result.status,
                "step": result.step,
                "failure": result.failure,
                "machine": dict(result.machine),
                "loss": result.loss,
                "bits_per_byte": result.bits_per_byte,
                "max_violation": result.max_violation,
                "dropped_fraction": result.dropped_fraction,
                "experts_per_token": result.experts_per_token,
                "tokens_per_second": result.tokens_per_second,
            }
            for result in summary.results
        }
        return {
            "labels": dict(summary.row.labels),
            "compute": asdict(summary.compute),
            "relative_compute": summary.relative_compute,
            "loss": asdict(summary.loss),
            "bits_per_byte": asdict(summary.bits_per_byte),
            "comparison": summary.comparison and asdict(summary.comparison),
            "max_violation": asdict(summary.max_violation),
            "dropped_fraction": asdict(summary.dropped_fraction),
            "experts_per_token": asdict(summary.experts_per_token),
            "tokens_per_second": asdict(summary.tokens_per_second),
            "step_seconds": asdict(summary.step_seconds),
            "runs": runs,
        }

    return finite(
        {
            "name": sweep.ablation.name,
            "complete": sweep.complete,
            "seeds": sweep.ablation.seeds,
            "baseline": sweep.ablation.baseline_name,
            "margin": sweep.ablation.margin,
            "rows": {summary.name: row(summary) for summary in sweep.rows},
            "scaling": _scaling(sweep),
            "not_possible": {row.name: row.reason for row in sweep.impossible},
        }
    )


def _scaling(sweep: Sweep) -> dict[str, Any] | None:
    found = scaling(sweep)
    return found and asdict(found)
