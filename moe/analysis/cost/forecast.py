"""How long work takes on a device whose rates were measured: a forecast, where `roofline` is a bound.

What it adds to the bound: products, attention and copies at the rates that kernels reach on the device, the
passes between products that no kernel fuses away, and a fixed time for each kernel that is started.
"""

from dataclasses import dataclass

from moe.analysis.cost.matrices import ROW_BYTES
from moe.analysis.cost.passes import SCORES, Parts
from moe.nn import TransformerConfig

NORM_PASSES = {"forward": 2, "training": 5}  # reads and writes of a row; backward reads two and writes one
LOSS_BYTES = 4 + 4 + 2  # of a logit: read for the sum, read for its gradient, which is written in bfloat16
LAUNCHES, PASSES = "launches", "element-wise passes"  # what a forecast adds to the parts of the model


@dataclass(frozen=True)
class Rates:
    """What one device reaches."""

    products: float
    """FLOP/s of a large matrix product."""

    attention: float
    """FLOP/s of causal attention, forward and backward, by what the model counts for it."""

    bandwidth: float
    """Bytes/s of a copy, read and written."""

    kernel: float
    """Seconds of the smallest kernel, one after the other."""


def forecast(parts: Parts, rates: Rates, *, passes: float = 0.0, kernels: int = 0) -> dict[str, float]:
    """Seconds of each part, one after the other.

    Args:
        parts: work of one device.
        rates: of the device.
        passes: bytes of `bytes_between_products`.
        kernels: that the program starts.
    """
    found = {
        name: max(
            work.flops / (rates.attention if name == SCORES else rates.products),
            work.bytes / rates.bandwidth,
        )
        for name, work in parts.items()
    }
    return found | {PASSES: passes / rates.bandwidth, LAUNCHES: kernels * rates.kernel}


def bytes_between_products(config: TransformerConfig, tokens: int, *, training: bool) -> float:
    """Bytes read and written by norms, rotations and the softmax of the loss, which are kernels of their own.

    Args:
        config: the model.
        tokens: that go through it.
        training: with the backward pass and the loss.
    """
    attention, layers = config.attention, len(config.layers)
    normed = (2 * layers + 1) * config.width
    turned = layers * (attention.heads + attention.kv_heads) * attention.head_width
    if getattr(attention, "qk_norm", "none") != "none":
        turned *= 2
    rows = (normed + turned) * NORM_PASSES["training" if training else "forward"] * ROW_BYTES
    return float(tokens * (rows + (LOSS_BYTES * config.vocab_size if training else 0)))
