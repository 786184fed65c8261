"""Where the time of a profiled program went: every kernel's, summed by the part of the model it belongs to.

XLA names the instruction behind a kernel in the profile, and the source lines behind an instruction in the
text of the compiled program. The innermost line inside this repository says the part. A kernel that fuses
instructions of several parts counts under that of the one which XLA names it by, usually the last.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax

# Parts of a train step by source file, from the root of the repository; the longest name that fits counts.
PARTS = {
    "moe/kernels/attention.py": "attention",
    "moe/nn/attention.py": "attention projections",
    "moe/nn/norm.py": "norms",
    "moe/kernels/": "experts",
    "moe/kernels/permute.py": "dispatch and combine",
    "moe/nn/feed_forward.py": "experts",
    "moe/dispatch/": "dispatch and combine",
    "moe/nn/router.py": "routing",
    "moe/nn/moe_layer.py": "routing",
    "moe/routing/": "routing",
    "moe/balance/": "routing",
    "moe/nn/transformer.py": "residual stream and embedding",
    "moe/kernels/linear_cross_entropy.py": "output head and loss",
    "moe/nn/parameter.py": "weights to compute precision",
    "moe/training/": "optimizer and metrics",
    "moe/optim.py": "optimizer and metrics",
}
WITHOUT_PART = ("moe/kernels/linear.py",)  # serves several: the line that called it says which
REST = "the rest"


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several of the same instruction and name, over all profiled steps."""

    name: str
    instruction: str
    """Of the compiled program; of a CUDA graph its name, and empty where the profile does not say."""

    part: str
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
        seconds: dict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            seconds[kernel.part] += kernel.seconds
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Event:
    """One run of one kernel, in nanoseconds."""

    name: str
    instruction: str
    start: float
    end: float


def kernel_times(trace: Path, compiled: str) -> KernelTimes:
    """The account of a trace that `jax.profiler` wrote, on one GPU.

    Args:
        trace: folder of the trace.
        compiled: text of the program that ran (`compiled.as_text()`).
    """
    (file,) = trace.rglob("*.xplane.pb")
    return account(device_events(jax.profiler.ProfileData.from_file(str(file))), parts(compiled))


def device_events(profile: jax.profiler.ProfileData) -> Iterable[Event]:
    """What ran on the first GPU, on all of its streams."""
    planes = [plane for plane in profile.planes if plane.name == "/device:GPU:0"]
    if not planes:
        raise ValueError("the profile has no GPU")
    for line in planes[0].lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            instruction = dict(event.stats).get("hlo_op", "")
            yield Event(event.name, str(instruction), event.start_ns, event.start_ns + event.duration_ns)


def account(events: Iterable[Event], part_of: dict[str, str]) -> KernelTimes:
    """Seconds by kernel.

    Args:
        events: in any order.
        part_of: the part of each instruction.
    """
    ordered = sorted(events, key=lambda event: event.start)
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
    kernels = [
        Kernel(name, instruction, part_of.get(instruction, REST), spent, calls[name, instruction])
        for (name, instruction), spent in seconds.items()
    ]
    span = (end - ordered[0].start) / 1e9
    return KernelTimes(span, sorted(kernels, key=lambda kernel: -kernel.seconds))


def parts(compiled: str) -> dict[str, str]:
    """The part of each instruction of a compiled program."""
    stacks = _stacks(compiled)
    instruction = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*stack_frame_id=(\d+)", re.MULTILINE)
    return {name: _part(stacks[int(frame)]) for name, frame in instruction.findall(compiled)}


def _part(stack: list[str]) -> str:
    for file in stack:
        if not file.endswith(WITHOUT_PART):
            fitting = [name for name in PARTS if f"/{name}" in file]
            if fitting:
                return PARTS[max(fitting, key=len)]
    return REST


def _stacks(compiled: str) -> dict[int, list[str]]:
    """Files of each stack frame and of those around it, the innermost first."""

    def section(title: str, pattern: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", compiled, re.MULTILINE)
        rows = (re.match(rf"(\d+) .*?{pattern}", row) for row in (found[1] if found else "").splitlines())
        return {int(row[1]): row[2] for row in rows if row}

    files = section("FileNames", '"(.*)"')
    location_file = section("FileLocations", r"file_name_id=(\d+)")
    frame_location = section("StackFrames", r"file_location_id=(\d+)")
    frame_parent = section("StackFrames", r"parent_frame_id=(\d+)")

    def stack(frame: int) -> list[str]:
        here = []
        while frame:
            here.append(files[int(location_file[int(frame_location[frame])])])
            frame = int(frame_parent[frame]) - 1  # as XLA prints it, one too many
        return here

    return {frame: stack(frame) for frame in frame_location}
