"""A step before it is compiled, and the FLOPs that it should cost. Nothing is allocated."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from moe.decode import CacheType
from moe.errors import UserError
from tpu.operations import EvenLoads


@dataclass(frozen=True)
class Lowered:
    """A step, ready to compile."""

    program: jax.stages.Lowered

    held: dict[str, Any]
    """What stays on the devices between steps, by kind: pytrees of shapes with shardings."""

    tokens: int
    """Taken in one run, over all devices."""

    model_flops: float
    """What the model itself costs, over all devices: MFU counts these."""

    expected_flops: float
    """The same with all that is computed beyond it, knowingly: what the program should cost."""

    even: EvenLoads
    """What its grouped products do."""


@dataclass(frozen=True)
class Serving:
    """What generation is laid out for: the options of that name of `generate.py`."""

    slots: int = 0
    """Sequences in progress at once, over all devices; 0 takes eight a device."""

    length: int = 0
    """Tokens that a slot holds; 0 takes the config's sequences."""

    prompt: int = 0
    """Tokens of a prompt, one of which each device reads; 0 takes as many as a slot holds."""

    cache: CacheType = "bfloat16"
    """How keys and values are stored."""

    def __post_init__(self):
        for name in ("slots", "length", "prompt"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 0")


def device_bytes(shapes: Any) -> int:
    """Bytes of a pytree of shapes with shardings on one device."""
    leaves = jax.tree.leaves(shapes)
    return sum(int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize for s in leaves)
