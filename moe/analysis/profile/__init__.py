"""Where the time of a compiled program goes: its kernels, by part of the model and by kind of operation."""

from moe.analysis.profile.kernel_times import REST, Event, Kernel, KernelTimes, account, kernel_times
from moe.analysis.profile.program import kernels_launched, kinds, parts

__all__ = [
    "REST",
    "Event",
    "Kernel",
    "KernelTimes",
    "account",
    "kernel_times",
    "kernels_launched",
    "kinds",
    "parts",
]
