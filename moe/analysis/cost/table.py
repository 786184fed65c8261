"""A cost report on the terminal."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from moe.analysis.cost.report import CostReport, as_dict
from moe.analysis.cost.roofline import Timed

PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
SECONDS = (("d", 86400.0), ("h", 3600.0), ("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def show(report: CostReport) -> None:
    """Parameters, FLOPs, bytes, memory, times and costs."""
    console, found = Console(highlight=False), as_dict(report)
    console.print(
        f"[bold]{found['name']}[/]: {found['total_params']:,} parameters, {found['active_params']:,.0f} "
        f"active, {found['embedding_params']:,} of them in embedding and head\n"
    )
    _parts(console, found)
    if report.setup.model.looks_ahead:
        console.print(f"\nno serving: {report.setup.model.looks_ahead[0]} lets tokens see later ones")
    else:
        _decoding(console, found)
    _memory(console, found)
    _times(console, report)
    console.print()


def _parts(console: Console, found: dict[str, Any]) -> None:
    length, context = found["sequence_length"], found["context"]
    console.print(
        f"[bold]FLOPs of a token[/] in sequences of {length:,} (forward, training), prompts of {context:,}, "
        f"and decoded at {context:,}"
    )
    kinds = ("forward", "training", "prefill", "decode")
    kinds = tuple(kind for kind in kinds if kind in next(iter(found["parts"].values())))
    table = _table("part", "parameters", "active", *kinds)
    for name, part in found["parts"].items():
        numbers = [f"{part['total_params']:,}", f"{part['active_params']:,.0f}"]
        table.add_row(name, *numbers, *(scaled(part[kind]) for kind in kinds))
    sums = [scaled(sum(part[kind] for part in found["parts"].values())) for kind in kinds]
    table.add_section()
    table.add_row("all", f"{found['total_params']:,}", f"{found['active_params']:,.0f}", *sums)
    console.print(table)


def _decoding(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"\n[bold]bytes of a decode step[/] at {found['context']:,} tokens, weights in {found['weights']}, "
        f"cache in {found['cache']}, {found['load']} load"
    )
    table = _table(
        "batch",
        "experts\nof a layer",
        "experts",
        "other\nweights",
        "cache",
        "all, of\na token",
        "FLOPs\na byte",
    )
    for row in found["decode"]:
        touched = row["experts_touched"]
        kinds = ("expert_bytes", "other_weight_bytes", "cache_bytes", "bytes_per_token")
        table.add_row(
            f"{row['batch']:,}",
            "–" if touched is None else f"{touched:.1f}",
            *(f"{scaled(row[kind])}B" for kind in kinds),
            f"{row['intensity']:.1f}",
        )
    console.print(table)


def _memory(console: Console, found: dict[str, Any]) -> None:
    console.print("\n[bold]memory[/] over all chips")
    table, train, serve = _table("to train", ""), found["memory"]["train"], found["memory"]["serve"]
    for name, stored in train.items():
        if isinstance(stored, float) and stored:
            table.add_row(name if name != "total" else "at the most", f"{scaled(stored)}B")
    console.print(table)
    if not found["looks_ahead"]:
        table = _table("to serve", *serve, f"cache of {found['context']:,} tokens")
        cache = f"{scaled(found['memory']['cache_of_a_sequence'])}B"
        table.add_row("", *(f"{scaled(stored)}B" for stored in serve.values()), cache)
        console.print(table)


def _times(console: Console, report: CostReport) -> None:
    names = [workload.name.replace(" ", "\n") for workload in report.workloads]

    def by_hardware(title: str, cell: Callable[[Timed], str]) -> None:
        console.print(f"\n[bold]{title}[/]")
        table = _table("", *names)
        for chip, times in report.times.items():
            table.add_row(chip.name, *map(cell, times))
        console.print(table)

    def coloured(t: Timed) -> str:
        return f"[{'cyan' if t.bound == 'compute' else 'yellow'}]{duration(t.seconds)}[/]"

    by_hardware("time of a step[/], bound by [cyan]arithmetic[/] or [yellow]memory[/][bold]", coloured)
    by_hardware("on so many chips", lambda t: str(t.chips))
    by_hardware("tokens a second and chip", lambda t: scaled(t.tokens_per_second_per_chip))
    if any(times[0].dollars_per_million_tokens for times in report.times.values()):
        by_hardware("dollars for a million tokens", lambda t: dollars(t.dollars_per_million_tokens))


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def scaled(number: float) -> str:
    """Three digits and a prefix: 3.35 G."""
    for prefix, size in PREFIXES:
        if number >= 0.9995 * size:
            return f"{three_digits(number / size)} {prefix}"
    return f"{three_digits(number)} "


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, size = next((each for each in SECONDS if seconds >= each[1]), SECONDS[-1])
    return f"{three_digits(seconds / size)} {unit}"


def dollars(price: float | None) -> str:
    """Three digits; a dash where no price is known."""
    return "–" if price is None else f"{price:.3g}"


def three_digits(number: float) -> str:
    """A number below 1000, to three digits."""
    return (
        f"{number:.0f}"
        if number >= 99.95 or not number
        else f"{number:.1f}"
        if number >= 9.995
        else f"{number:.2f}"
    )
