"""Cells of the tables that show speeds: a dash where there is nothing to say."""

from collections.abc import Iterable


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def tera(value: float | None) -> str:
    """In units of 10^12."""
    return f"{value / 1e12:.{0 if value >= 1e13 else 3}f}" if value else "–"


def part(value: float | None, whole: float | None) -> str:
    """In percent of the whole."""
    return f"{value / whole:.0%}" if value and whole else "–"


def ratio(value: float | None, other: float | None) -> str:
    """Of one to the other."""
    return f"{value / other:.2f}" if value and other else "–"


def gibi(value: int | None) -> str:
    """Bytes in units of 2^30; empty where they are not known."""
    return "" if value is None else f"{value / 2**30:.2f}"
