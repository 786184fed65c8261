"""Experts under strategies that blend: over mixtures of tokens, or merged into one.

Both take what a dispatch takes and answer as it does, so the layer around them stays the same.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.dispatch import Dispatched, ExpertFunction, ExpertWeights
from moe.kernels import Groups
from moe.mesh import axes, axis_size, layouts, spec, varying
from moe.nn.parameter import plain
from moe.routing import Blend, Merger, Mixture


def blend(
    x: Float[Array, "groups T D"], how: Blend, weights: ExpertWeights, experts: ExpertFunction
) -> Dispatched:
    """Apply the experts as a blending strategy says; nothing can be dropped.

    Args:
        x: tokens in groups, split over the mesh by group.
        how: a `Mixture` or a `Merger`, fields [groups, ...].
        weights: the experts' matrices [E, ...], split over the `expert` axis.
        experts: what they compute.
    """
    match how:
        case Mixture():
            function, decided = _mix, (how.dispatch, how.combine)
        case Merger():
            function, decided = _merge, (how.part,)
        case _:
            raise TypeError(f"{type(how).__name__} is neither a Mixture nor a Merger")

    def on_one_device(x, decided, weights):
        inputs = varying((x, decided, weights), axes("group") + axes("mlp"))
        y = function(*inputs, experts)
        return jax.lax.psum(y, axes("mlp")) if axes("mlp") else y

    in_specs = (spec("group"), spec("group"), layouts(weights))
    y = jax.shard_map(on_one_device, in_specs=in_specs, out_specs=spec("group"))(x, decided, weights)
    return Dispatched(y, jnp.zeros_like(how.token, bool), None)


def _mix(x, decided, weights, experts):
    """On one device: its groups' slots travel to their experts and back (all-to-all over `expert`)."""
    dispatch, combine = decided
    slots = jnp.einsum("gtd,gtep->egpd", x, dispatch.astype(x.dtype))
    if axis_size("expert") > 1:
        slots = jax.lax.all_to_all(slots, "expert", split_axis=0, concat_axis=1, tiled=True)
    y = _uniform(experts, weights, slots.reshape(slots.shape[0], -1, slots.shape[-1])).reshape(slots.shape)
    if axis_size("expert") > 1:
        y = jax.lax.all_to_all(y, "expert", split_axis=1, concat_axis=0, tiled=True)
    return jnp.einsum("egpd,gtep->gtd", y, combine.astype(x.dtype))


def _merge(x, decided, weights, experts):
    """On one device: along `expert` each merges its own experts for all, and the sums are scattered."""
    (part,) = decided
    groups, segments, _ = part.shape
    split, local_experts = axis_size("expert"), next(iter(weights.values())).shape[0]
    if split > 1:
        part = jax.lax.all_gather(part, "expert", axis=0, tiled=True)
        first = jax.lax.axis_index("expert") * local_experts
        part = jax.lax.dynamic_slice_in_dim(part, first, local_experts, axis=2)

    def merged(w):
        w = plain(w, x.dtype)
        total = jnp.einsum("gne,edf->gndf", part, w, preferred_element_type=jnp.float32)
        if split > 1:
            total = jax.lax.psum_scatter(total, "expert", scatter_dimension=0, tiled=True)
        return total.astype(w.dtype).reshape(groups * segments, *w.shape[1:])

    rows = x.reshape(groups * segments, -1, x.shape[-1])
    return _uniform(experts, {name: merged(w) for name, w in weights.items()}, rows).reshape(x.shape)


def _uniform(experts, weights, rows: Float[Array, "E R D"]) -> Float[Array, "E R D"]:
    """The experts over equally many rows each."""
    count, each, width = rows.shape
    sizes = jnp.full_like(rows, each, dtype=jnp.int32, shape=(count,))
    layout = Groups(sizes, tile=each, uniform=True)
    return experts.of_rows(weights, rows.reshape(count * each, width), layout).reshape(rows.shape)
