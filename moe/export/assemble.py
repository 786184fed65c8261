"""A model's state, put together from parameters that come a layer at a time."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from moe.nn import TransformerConfig, build

ReadWeights = Callable[[str, int | None], np.ndarray | None]
"""One layer's part of a parameter, by the parameter's name and the layer's place in it (None where it is not
stacked by layer); None where the model has no such parameter."""


def assemble(model: TransformerConfig, read: ReadWeights) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, parameters and the rest of a model's state, on the mesh that is set.

    The rest is as at the start of training, but for what `read` has of it (the bias of a controller).
    """
    graph, params, _ = _split(jax.eval_shape(lambda: build(model, jax.random.key(0))))
    rest = jax.jit(lambda: _split(build(model, jax.random.key(0)))[2])()
    return graph, _filled(params, read), _filled(rest, read)


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest


def _filled(state: nnx.State, read: ReadWeights) -> nnx.State:
    paths = [path for path, _ in nnx.to_flat_state(state)]
    arrays, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [_read(p, a, read) for p, a in zip(paths, arrays, strict=True)])


def _read(path: tuple, own: jax.Array | jax.ShapeDtypeStruct, read: ReadWeights) -> jax.Array:
    """The parameter at a path, laid out as `own` is; `own` itself where there is none to read."""
    leaf = "/".join(map(str, path))
    places = range(own.shape[0]) if path[0] == "stacks" else [None]
    parts = [part for place in places if (part := read(leaf, place)) is not None]
    if not parts and isinstance(own, jax.Array):
        return own
    if len(parts) < len(places):
        raise ValueError(f"nothing to fill {leaf} with")
    whole = np.stack(parts) if path[0] == "stacks" else parts[0]
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.typeof(own).sharding.spec)
    return jax.make_array_from_callback(own.shape, sharding, lambda index: whole[index])
