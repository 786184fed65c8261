"""The second moments of every matrix's inputs over some text, by a backward pass (`moe.kernels.observe`)."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moe.kernels.observe import ObservedMatrix
from moe.mesh import spec
from moe.nn.quantized import format_of
from moe.quant import Format
from moe.training.evaluate import to_devices

Moments = dict[tuple, Float[Array, "*n D D"]]
"""For each matrix that is quantised, by its path: the sum of x x^T over its inputs, each expert's own."""


def measure(
    step: Callable[..., Moments],
    params: nnx.State,
    controllers: nnx.State,
    batches: Iterable[dict[str, np.ndarray]],
) -> Moments:
    """Sums over batches of whole rows.

    Args:
        step: from `make_moment_step`.
        params: of the model.
        controllers: state of balance controllers.
        batches: `tokens` of this process's rows.
    """
    total = None
    for batch in batches:
        found = step(params, controllers, to_devices(batch["tokens"]))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None
    return total


def make_moment_step(graph: nnx.GraphDef, dtype: jnp.dtype, *, chunks: int = 1) -> Callable[..., Moments]:
    """Build the compiled step: (params, controllers, tokens [B, S+1]) -> moments.

    Args:
        graph: structure of the model.
        dtype: compute precision.
        chunks: parts of the sequence whose logits are made one after the other.
    """

    def step(params, controllers, tokens):
        def anything(moments: Moments):
            observed = [
                (path, _observed(v, moments.get(path), dtype)) for path, v in nnx.to_flat_state(params)
            ]
            model = nnx.merge(graph, nnx.from_flat_state(observed), controllers)
            hidden, _ = model(tokens[:, :-1])
            return sum(jnp.sum(model.logits(part)) for part in jnp.split(hidden, chunks, axis=1))

        matrices = {path: v for path, v in nnx.to_flat_state(params) if format_of(v, Format())}
        return jax.grad(anything)({path: _zeros(v) for path, v in matrices.items()})

    return jax.jit(step)


def _observed(variable: nnx.Variable, moment, dtype: jnp.dtype) -> nnx.Variable:
    if moment is None:
        return variable
    return variable.replace(ObservedMatrix(variable[...].astype(dtype), moment))


def _zeros(variable: nnx.Variable):
    *leading, inputs, _ = variable.shape
    layout = spec(*variable.get_metadata("out_sharding")[:-2], None, None)
    return jnp.zeros((*leading, inputs, inputs), jnp.float32, out_sharding=layout)
