"""How long work takes on chips that do nothing else: each part at the peak or at full bandwidth."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe.analysis.cost.passes import Parts, Work, total
from moe.analysis.hardware import Hardware


@dataclass(frozen=True)
class Workload:
    """Something to be timed."""

    name: str
    """As tables and pictures call it."""

    tokens: int
    """That it trains on, reads or makes."""

    parts: Parts
    """Its work, which parts do one after the other."""

    memory: float
    """Bytes that it needs on all chips together."""

    @property
    def work(self) -> Work:
        """All of it."""
        return total(self.parts)


@dataclass(frozen=True)
class Timed:
    """A workload on a number of chips."""

    chips: int
    """That share the work evenly and without sending anything."""

    seconds: float
    """The sum over parts of what binds each: arithmetic or memory."""

    compute_seconds: float
    """Of all FLOPs at the peak."""

    memory_seconds: float
    """Of all bytes at full bandwidth."""

    seconds_by_part: Mapping[str, float]
    """The terms of `seconds`."""

    tokens_per_second_per_chip: float

    dollars_per_million_tokens: float | None
    """At the price that was given, None where none was."""

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """What takes longer of the whole."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"


def timed(
    workload: Workload, hardware: Hardware, chips: int = 0, dollars_per_hour: float | None = None
) -> Timed:
    """Time and cost of a workload.

    Args:
        workload: what is done.
        hardware: on what.
        chips: how many share it; 0 takes the fewest that hold it (`fewest_chips`).
        dollars_per_hour: of one chip.
    """
    chips = chips or fewest_chips(workload.memory, hardware)
    peak, bandwidth = chips * hardware.peak_flops, chips * hardware.bandwidth
    parts = {name: max(w.flops / peak, w.bytes / bandwidth) for name, w in workload.parts.items()}
    seconds, work = sum(parts.values()), workload.work
    dollars = dollars_per_hour and dollars_per_hour * chips * seconds / 3600 / workload.tokens * 1e6
    return Timed(
        chips,
        seconds,
        work.flops / peak,
        work.bytes / bandwidth,
        parts,
        workload.tokens / seconds / chips,
        dollars,
    )


def fewest_chips(memory: float, hardware: Hardware) -> int:
    """The fewest chips, a power of two, whose memory holds so many bytes."""
    chips = 1
    while chips * hardware.memory < memory:
        chips *= 2
    return chips
