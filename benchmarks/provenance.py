"""What a measurement must say of itself: date, commit, hardware, and whether the machine was quiet."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe.machine import commit, cpuinfo, processor


def provenance() -> dict[str, Any]:
    """Date, commit and whether the tree differs from it; processor, cores, memory."""
    memory = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    name, modified = commit()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": name,
        "modified": modified,
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "instructions": sorted(
                {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(cpuinfo("flags").split())
            ),
            "memory_bytes": memory,
        },
        "python": platform.python_version(),
    }


class Others:
    """How much of the machine other programs used since this object was made.

    A busy machine does not slow all programs alike: torch's threads wait for one another at every operation,
    and sharing the cores can make it many times slower.
    """

    def __init__(self):
        self._before = self._seconds()

    def share(self) -> float:
        """Part of all cores' time, 0 to 1; of children, only those that have ended are known as ours."""
        spent = [after - before for before, after in zip(self._before, self._seconds(), strict=True)]
        everything, idle, ours = spent
        return max(0.0, everything - idle - ours) / everything

    def _seconds(self) -> tuple[float, float, float]:
        # user, nice, system, idle, iowait, irq, softirq, steal; the guests' that follow are in user already.
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        tick = 1 / os.sysconf("SC_CLK_TCK")
        return sum(ticks) * tick, (ticks[3] + ticks[4]) * tick, sum(os.times()[:4])
