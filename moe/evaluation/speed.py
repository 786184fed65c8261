"""What a model's speed on the present device is, beside what it should be, and what binds it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np

from moe.analysis.cost.forecast import LAUNCHES, Rates, forecast
from moe.analysis.cost.passes import Parts, Work, total
from moe.analysis.cost.roofline import Workload, timed
from moe.analysis.hardware import Hardware, data_sheet
from moe.analysis.profile.program import COMMUNICATION

Bound = Literal["compute", "memory", "communication", "input"]


@dataclass(frozen=True)
class Timing:
    """One workload on the device, by prediction and by measurement."""

    name: str
    batch: int
    """Sequences, on each device."""

    tokens: int
    """That it trains on, reads or makes, on each device."""

    parts: Parts
    """Its work, on each device."""

    passes: float
    """Bytes of `bytes_between_products`."""

    kernels: int
    """That the compiled program starts."""

    seconds: list[float]
    """Measured, one of each repetition."""

    profile: Mapping[str, Any] | None
    """See `profile_record`; None where none was taken."""

    input_seconds: float | None = None
    """In which the host makes the next batch; None where it was not measured."""


def present_hardware(rates: Rates) -> Hardware:
    """The device that is here: by its data sheet, or where none gives its figures by its rates."""
    kind = jax.devices()[0].device_kind
    chip = data_sheet(kind)
    if chip is None:
        source = "measured by eval.py --speed"
        return Hardware(
            kind, kind, rates.products, rates.bandwidth, float("inf"), source=source, measured=True
        )
    return chip


def as_dict(timing: Timing, rates: Rates, hardware: Hardware) -> dict[str, Any]:
    """Everything about a workload, as JSON holds it."""
    predicted = forecast(timing.parts, rates, passes=timing.passes, kernels=timing.kernels)
    work, seconds = total(timing.parts), sum(predicted.values())
    peak, bandwidth = hardware.peak_flops / hardware.devices, hardware.bandwidth / hardware.devices
    bound = timed(Workload(timing.name, timing.tokens, timing.parts, 0.0), hardware, chips=1)
    median, p90, p99 = (float(x) for x in np.percentile(timing.seconds, (50, 90, 99)))
    shares = shares_of_time(timing, predicted, rates)
    return {
        "name": timing.name,
        "batch": timing.batch,
        "tokens": timing.tokens,
        "median": median,
        "p90": p90,
        "p99": p99,
        "seconds": timing.seconds,
        "tokens_per_second": timing.tokens / median,
        "flops": work.flops,
        "bytes": work.bytes,
        "mfu": work.flops / median / peak,
        "bandwidth_utilisation": work.bytes / median / bandwidth,
        "bound_seconds": bound.seconds * hardware.devices,
        "predicted": seconds,
        "predicted_by_part": predicted,
        "error": seconds / median - 1,
        "kernels": timing.kernels,
        "input_seconds": timing.input_seconds,
        "shares": shares,
        "bound": max(shares, key=lambda kind: shares[kind]),
        "profile": timing.profile,
    }


def shares_of_time(timing: Timing, predicted: Mapping[str, float], rates: Rates) -> dict[Bound, float]:
    """How much of the time is bound by what; sums to 1.

    The profile says for how long the device sends, and for how long nothing runs on it since the host has no
    batch or no kernel ready. The rest, and all of it where there is no profile, is divided as the forecast
    divides it: a part is bound by arithmetic if that takes longer than its bytes.
    """
    if timing.input_seconds and timing.input_seconds > max(timing.seconds):
        return {"compute": 0.0, "memory": 0.0, "communication": 0.0, "input": 1.0}
    busy = {name: seconds for name, seconds in predicted.items() if name != LAUNCHES}
    arithmetic = sum(s for name, s in busy.items() if _by_arithmetic(timing.parts.get(name), s, rates))
    compute = arithmetic / (sum(busy.values()) or 1.0)
    sending, waiting = 0.0, predicted[LAUNCHES] / (sum(predicted.values()) or 1.0)
    profile = timing.profile
    if profile and "failed" not in profile:
        waiting = profile["idle"] / profile["span"]
        sending = (1 - waiting) * profile["kinds"].get(COMMUNICATION, 0.0) / profile["busy"]
    rest = 1 - waiting - sending
    return {
        "compute": rest * compute,
        "memory": rest * (1 - compute),
        "communication": sending,
        "input": waiting,
    }


def _by_arithmetic(work: Work | None, seconds: float, rates: Rates) -> bool:
    return work is not None and work.bytes / rates.bandwidth < seconds


def report(name: str, device: Mapping[str, Any], rates: Rates, timings: list[Timing]) -> dict[str, Any]:
    """The whole report, as JSON holds it.

    Args:
        name: of the run or the config.
        device: what else is told of it: how many, context, formats.
        rates: of the device.
        timings: of all workloads.
    """
    hardware = present_hardware(rates)
    return {
        "name": name,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "hardware": asdict(hardware),
        "rates": asdict(rates),
        **device,
        "workloads": [as_dict(timing, rates, hardware) for timing in timings],
    }


def shared(parts: Parts, devices: int) -> Parts:
    """The work of one of several devices that share it evenly."""
    return {name: Work(work.flops / devices, work.bytes / devices) for name, work in parts.items()}
