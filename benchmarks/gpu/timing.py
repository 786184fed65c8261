"""How a time is taken, in every measured program alike, whatever its framework.

A call is enqueued many times back to back and waited for once; that is a round. The time of a call is the
round's over the number of calls. The device always has the next call waiting, so launching costs nothing
unless it takes longer than the work; nothing is subtracted.
"""

import math
import time
from collections.abc import Callable
from typing import Any

LEAST_CALLS, LEAST_SECONDS = 20, 0.05  # of a round


def seconds_of_rounds(call: Callable[[], Any], wait: Callable[[Any], Any], rounds: int) -> list[float]:
    """Seconds of one call, for each round; the first calls, which compile, are not among them.

    Args:
        call: enqueues the work and returns what `wait` needs.
        wait: returns when the work is done, and with it all that was enqueued before.
        rounds: how many.
    """
    wait(call())
    guess = _round(call, wait, 3)
    calls = max(LEAST_CALLS, math.ceil(LEAST_SECONDS / guess))
    return [_round(call, wait, calls) for _ in range(rounds)]


def _round(call, wait, calls: int) -> float:
    started = time.perf_counter()
    result = None
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - started) / calls
