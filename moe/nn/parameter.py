"""How parameters are declared and used: one line gives shape, layout in storage and initial values."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from moe.kernels.observe import ObservedMatrix
from moe.mesh import spec
from moe.quant import QuantizedMatrix, dequantize


def normal(
    key: Key[Array, ""], shape: tuple[int, ...], axes: tuple[str | None, ...], std: float
) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution cut at three deviations.

    Args:
        key: randomness.
        shape: of the parameter.
        axes: logical axis names (`moe.mesh.RULES`), one for each dimension.
        std: standard deviation.
    """
    values = std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)
    return nnx.Param(values, out_sharding=axes)


def ones(size: int) -> nnx.Param:
    """A scale that starts at one, kept whole on every device."""
    return nnx.Param(jnp.ones(size, jnp.float32), out_sharding=("norm",))


def use(param: nnx.Param, dtype: jnp.dtype, *kept: str | None) -> Any:
    """The parameter in compute precision, gathered from its FSDP storage except along the `kept` axes.

    The cast comes first, so that half the bytes travel. The gradient is the reverse: reduced and scattered
    back to storage.

    What is quantised (`moe.nn.quantized`) or observed (`moe.compress.moments`) stays so, for the products to
    deal with, unless `tensor` splits it.
    """
    value, layout = param.get_value(), spec(*kept)
    if isinstance(value, QuantizedMatrix | ObservedMatrix):
        leading = len(value.shape) - 2
        value = jax.sharding.reshard(value, P(*layout[:leading]))
        if not any(layout[leading:]):
            return value
        value = plain(value, dtype)
    return jax.sharding.reshard(value.astype(dtype), layout)


def plain(w: Array | QuantizedMatrix | ObservedMatrix, dtype: jnp.dtype) -> Array:
    """A matrix as one array, for what is no product of rows with it."""
    match w:
        case QuantizedMatrix():
            return dequantize(w, dtype)
        case ObservedMatrix():
            return w.values
    return w
