"""What an engine's program answers: seconds of a prompt read and of tokens made behind it, turn by turn.

Standard library and numpy only: peers import this file in their environments.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def prompt(task: dict[str, Any]) -> list[int]:
    """The same random tokens for every engine."""
    return np.random.default_rng(0).integers(0, task["vocabulary"], task["prompt"]).tolist()


def work_of(read: Callable[[], object], make: Callable[[], list[int]]) -> Callable[[int], dict[str, Any]]:
    """What `benchmarks.worker.serve` asks for.

    Args:
        read: reads the prompt into an empty cache, up to the first new token.
        make: makes the tokens behind that one; they are given back.
    """

    def work(turns: int) -> dict[str, Any]:
        reading, making, different = [], [], 0
        for _ in range(turns):
            began = time.perf_counter()
            read()
            between = time.perf_counter()
            tokens = make()
            ended = time.perf_counter()
            reading.append(between - began)
            making.append(ended - between)
            different = len(set(tokens))
        return {"prefill": reading, "decode": making, "different_tokens": different}

    return work
