"""What quantisation cost: as JSON, and on the terminal."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe.compress.compare import Answers, together
from moe.compress.sensitivity import Sensitivity
from moe.compress.speed import Speed
from moe.compress.worse_slices import RULE, worse_slices
from moe.training.report import bars


def as_dict(
    run: str,
    step: int,
    name: str,
    slices: Mapping[str, Answers],
    size: tuple[dict[str, int], dict[str, int]],
    speed: list[Speed] | str | None,
    sensitivity: Sensitivity | None,
) -> dict:
    """Everything measured, as JSON holds it.

    Args:
        run: its name.
        step: of the checkpoint.
        name: of the format.
        slices: answers before and after, slice by slice.
        size: bytes of each kind of weights before and after.
        speed: before and after, for each batch, or why there is none; None if not measured.
        sensitivity: of layers and experts, if measured.
    """
    return {
        "run": run,
        "step": step,
        "quantized": name,
        "slices": {slice_: answers.summary() for slice_, answers in slices.items()},
        "total": together(slices.values()).summary(),
        "bytes_before": size[0],
        "bytes_after": size[1],
        "speed": [asdict(each) for each in speed] if isinstance(speed, list) else speed,
        "rule": RULE,
        "worse_slices": [asdict(slice_) | {"message": str(slice_)} for slice_ in worse_slices(slices)],
        "sensitivity": None if sensitivity is None else asdict(sensitivity),
    }


def write(folder: Path, report: dict) -> Path:
    """quantized-FORMAT.json, whole or not at all, into `folder`, which is made where it is missing."""
    folder.mkdir(exist_ok=True)
    path = folder / f"quantized-{report['quantized']}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(path)
    return path


def show(report: dict) -> None:
    """The tables on the terminal."""
    console = Console(highlight=False)
    console.print(
        f"[bold]{report['run']}[/] after {report['step']} steps, quantised: {report['quantized']}\n"
    )
    console.print(_quality(report))
    for slice_ in report["worse_slices"]:
        console.print(f"[bold red]warning:[/] {slice_['message']}")
    if report["worse_slices"]:
        console.print(f"[dim]{report['rule']}[/]")

    console.print("\n[bold]bytes of the weights[/]")
    table = _table("", "before", "after", "")
    before, after = report["bytes_before"], report["bytes_after"]
    rows = {**{kind: (before[kind], after[kind]) for kind in before}, "all": (_sum(before), _sum(after))}
    for kind, (old, new) in rows.items():
        table.add_row(kind, f"{old:,}", f"{new:,}", f"{new / old:.2f}")
    console.print(table)

    if isinstance(report["speed"], str):
        console.print(f"\n[bold]speed[/] not measured: {report['speed']}")
    elif report["speed"]:
        console.print("\n[bold]tokens a second[/]")
        console.print(_speed(report["speed"]))

    if report["sensitivity"]:
        console.print("\n[bold]sensitivity[/]: KL, in nats a million tokens, with only this rounded")
        console.print(_sensitivity(report["sensitivity"]))


def _quality(report: dict) -> Table:
    table = _table("slice", "loss", "after", "change", "bits/byte", "after", "top-1", "KL", "tokens")
    for name, found in {**report["slices"], "all": report["total"]}.items():
        table.add_row(
            name,
            f"{found['loss_before']:.4f}",
            f"{found['loss_after']:.4f}",
            f"{found['relative_increase']:+.3%}",
            f"{found['bits_per_byte_before']:.4f}",
            f"{found['bits_per_byte_after']:.4f}",
            f"{found['agreement']:.2%}",
            f"{found['divergence']:.5f}",
            f"{found['targets']:,}",
        )
    return table


def _speed(found: list[dict]) -> Table:
    table = _table("batch", "prefill", "after", "", "decode", "after", "")
    for each in found:
        row = [str(each["batch"])]
        for before, after in (each["prefill"], each["decode"]):
            row += [f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.2f}"]
        table.add_row(*row)
    return table


def _sensitivity(found: dict) -> Table:
    table = _table("layer", "all of it", "expert: median", "most", "which", "")
    for layer, divergence in enumerate(found["layers"]):
        experts = found["experts"].get(layer, found["experts"].get(str(layer)))
        row = [str(layer), _millionths(divergence)]
        if experts:
            median, most = sorted(experts)[len(experts) // 2], max(experts)
            row += [_millionths(median), _millionths(most), str(experts.index(most))]
            row += [bars([value / median if median else 0.0 for value in experts])]
        table.add_row(*row)
    table.add_row("head", _millionths(found["head"]))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right" if column else "left")
    return table


def _millionths(value: float) -> str:
    return f"{value * 1e6:.1f}"


def _sum(sizes: dict[str, int]) -> int:
    return sum(sizes.values())
