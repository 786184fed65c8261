"""Bytes that a model's weights take when it is served."""

import jax.numpy as jnp
from flax import nnx

from moe.nn.quantized import EMBEDDING, HEAD, format_of
from moe.quant import Format, QuantizedMatrix

KINDS = ("experts", "attention and dense", "output head", "embedding", "routers and norms")


def weight_bytes(params: nnx.State, dtype: jnp.dtype) -> dict[str, int]:
    """Bytes of each kind of weights: quantised ones as they are, other matrices in compute precision.

    Args:
        params: of a `Transformer`, quantised or not.
        dtype: compute precision.
    """
    found: dict[str, int] = dict.fromkeys(KINDS, 0)
    for _, variable in nnx.to_flat_state(params):
        value = variable.get_value()
        own = dtype if format_of(variable, Format()) or _axes(variable) == EMBEDDING else value.dtype
        size = value.nbytes if isinstance(value, QuantizedMatrix) else value.size * own.itemsize
        found[_kind(variable)] += size
    return {kind: size for kind, size in found.items() if size}


def _kind(variable: nnx.Variable) -> str:
    axes = _axes(variable)
    if axes in (EMBEDDING, HEAD):
        return "embedding" if axes == EMBEDDING else "output head"
    if format_of(variable, Format()) is None:
        return "routers and norms"
    return "experts" if "expert" in axes else "attention and dense"


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    return variable.get_metadata("out_sharding")
