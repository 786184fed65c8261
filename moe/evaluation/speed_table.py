"""A report of speed on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moe.analysis.cost.table import duration, scaled

NARROWEST = 112


def show(found: dict[str, Any]) -> None:
    """Times beside their prediction, what binds each, and where the time went."""
    console, rates = Console(highlight=False), found["rates"]
    console.width = max(console.width, NARROWEST)  # a pipe is told to have 80 columns
    console.print(
        f"[bold]{found['name']}[/] on {found['devices']} x {found['device']}; weights in {found['weights']}, "
        f"cache of {found['context']:,} tokens in {found['cache']}, prompts of {found['prompt']:,}\n"
        f"reached here: products {scaled(rates['products'])}F/s, attention {scaled(rates['attention'])}F/s, "
        f"copies {scaled(rates['bandwidth'])}B/s, a kernel {duration(rates['kernel'])}\n"
    )
    console.print(_times(found))
    console.print("\n[bold]what binds[/]: shares of the time")
    console.print(_shares(found))
    profiled = [w for w in found["workloads"] if w["profile"]]
    for workload in profiled:
        console.print(f"\n[bold]where the time of {workload['name']} goes[/]")
        console.print(_profile(workload["profile"]))
    console.print()


def _times(found: dict[str, Any]) -> Table:
    table = _table(
        "",
        "median",
        "p90",
        "p99",
        "predicted",
        "error",
        "bound",
        "tokens/s\na device",
        "MFU",
        "bandwidth",
    )
    for w in found["workloads"]:
        table.add_row(
            w["name"],
            *(duration(w[kind]) for kind in ("median", "p90", "p99", "predicted")),
            f"{w['error']:+.0%}",
            duration(w["bound_seconds"]),
            scaled(w["tokens_per_second"]),
            f"{w['mfu']:.1%}",
            f"{w['bandwidth_utilisation']:.1%}",
        )
    return table


def _shares(found: dict[str, Any]) -> Table:
    kinds = list(found["workloads"][0]["shares"])
    table = _table("", "bound by", *kinds, "kernels")
    for w in found["workloads"]:
        shares = (f"{w['shares'][kind]:.0%}" for kind in kinds)
        table.add_row(w["name"], f"[bold]{w['bound']}[/]", *shares, f"{w['kernels']:,}")
    return table


def _profile(profile: dict[str, Any]) -> Table | str:
    if "failed" in profile:
        return f"no profile: {profile['failed']}"
    table = _table("part of the model", "time", "", "kind of operation", "time", "")
    parts, kinds = (
        [(name, duration(s), f"{s / profile['busy']:.0%}") for name, s in profile[by].items()]
        for by in ("parts", "kinds")
    )
    idle = profile["idle"]
    kinds.append(("nothing runs", duration(idle), f"{idle / profile['span']:.0%} of the step"))
    for row in range(max(len(parts), len(kinds))):
        cells = [group[row] if row < len(group) else ("", "", "") for group in (parts, kinds)]
        table.add_row(*cells[0], *cells[1])
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        left = i == 0 or column in ("bound by", "kind of operation")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table
