"""Where the time of a profiled program went: every kernel's, by part of the model and by kind of operation.

XLA names the instruction behind a kernel in the profile; `program.py` says what an instruction belongs to. A
kernel that fuses instructions of several parts counts under that of the one which XLA names it by, usually
the last.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe.analysis.profile.program import COMMUNICATION, REST, kinds, parts

CONTAINER = re.compile(r"(while|call|conditional)\b")  # on CPUs an event around those of its body


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several of the same instruction and name, over all profiled steps."""

    name: str
    instruction: str
    """Of the compiled program; of a CUDA graph its name, and empty where the profile does not say."""

    part: str
    kind: str
    seconds: float
    """Of the device's time; of kernels that run at the same time, the one that began first takes it."""

    calls: int


@dataclass(frozen=True)
class KernelTimes:
    """A profile's account."""

    span: float
    """Seconds from the begin of the first kernel to the end of the last."""

    kernels: list[Kernel]
    """The costliest first."""

    @property
    def busy(self) -> float:
        """Seconds in which some kernel ran."""
        return sum(kernel.seconds for kernel in self.kernels)

    def by_part(self) -> dict[str, float]:
        """Seconds of each part, the costliest first."""
        return self._by(lambda kernel: kernel.part)

    def by_kind(self) -> dict[str, float]:
        """Seconds of each kind of operation, the costliest first."""
        return self._by(lambda kernel: kernel.kind)

    def _by(self, group: Callable[[Kernel], str]) -> dict[str, float]:
        seconds: dict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            seconds[group(kernel)] += kernel.seconds
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Event:
    """One run of one kernel, in nanoseconds."""

    name: str
    instruction: str
    start: float
    end: float


def kernel_times(trace: Path, compiled: str) -> KernelTimes:
    """The account of a trace that `jax.profiler` wrote, on the first GPU, or on the CPU.

    Args:
        trace: folder of the trace.
        compiled: text of the program that ran (`compiled.as_text()`).
    """
    (file,) = trace.rglob("*.xplane.pb")
    events = device_events(jax.profiler.ProfileData.from_file(str(file)))
    return account(events, parts(compiled), kinds(compiled))


def device_events(profile: Any) -> Iterable[Event]:
    """What ran on the first GPU, on all of its streams; on a CPU what all of its threads ran.

    Args:
        profile: a `jax.profiler.ProfileData`.

    Raises:
        ValueError: the profile has neither.
    """
    planes = {plane.name: plane for plane in profile.planes}
    gpu = "/device:GPU:0" in planes
    if not gpu and "/host:CPU" not in planes:
        raise ValueError("the profile has no GPU and no CPU")
    for line in planes["/device:GPU:0" if gpu else "/host:CPU"].lines:
        if gpu and not line.name.startswith("Stream"):
            continue
        for event in line.events:
            instruction = str(dict(event.stats).get("hlo_op", ""))
            if gpu or (instruction and not CONTAINER.match(instruction)):
                yield Event(event.name, instruction, event.start_ns, event.start_ns + event.duration_ns)


def account(
    events: Iterable[Event], part_of: Mapping[str, str], kind_of: Mapping[str, str] | None = None
) -> KernelTimes:
    """Seconds by kernel.

    Args:
        events: in any order.
        part_of: the part of each instruction.
        kind_of: its kind.

    Raises:
        ValueError: nothing ran.
    """
    ordered = sorted(events, key=lambda event: event.start)
    if not ordered:
        raise ValueError("the profile holds no operation")
    # Kernels that XLA itself makes are named after their instruction, with an underscore for each dot.
    by_kernel_name = {instruction.replace(".", "_"): instruction for instruction in part_of}
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    end = ordered[0].start
    for event in ordered:
        known = event.instruction in part_of
        instruction = event.instruction if known else by_kernel_name.get(event.name, event.instruction)
        seconds[event.name, instruction] += max(0.0, event.end - max(event.start, end)) / 1e9
        calls[event.name, instruction] += 1
        end = max(end, event.end)

    def kind(name: str, instruction: str) -> str:
        if name.startswith("nccl"):
            return COMMUNICATION
        return (kind_of or {}).get(instruction, REST)

    kernels = [
        Kernel(
            name,
            instruction,
            part_of.get(instruction, REST),
            kind(name, instruction),
            spent,
            calls[name, instruction],
        )
        for (name, instruction), spent in seconds.items()
    ]
    span = (end - ordered[0].start) / 1e9
    return KernelTimes(span, sorted(kernels, key=lambda kernel: -kernel.seconds))
