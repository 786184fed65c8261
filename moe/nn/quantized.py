"""A model's parameters with its matrices quantised, really or in pretence.

Quantised are the matrices of attention, feed-forwards, experts and latent projections. Routers, norms and
whatever else is small stay as they are, since rounding would decide routes. The output head takes eight bits
under every format and never rounds its inputs; the embedding, a table to look things up in, is kept in
compute precision.

The model's code knows nothing of this: a quantised parameter holds a `QuantizedMatrix` in the place of an
array, and the products of `moe.kernels` take either.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key

from moe.errors import UserError
from moe.mesh import axis_size, spec
from moe.quant import Format, Quantization, fake_quantize, quantize

EMBEDDING, HEAD = ("vocab", "embed"), ("embed", "vocab")
CLIP = "_clip"  # behind a matrix's name: the learned clipping of its scales


def format_of(variable: nnx.Variable, format: Format) -> Format | None:
    """What a parameter is quantised to where matrices are quantised to `format`; None for one that is not."""
    return format_of_axes(variable.get_metadata("out_sharding"), format)


def format_of_axes(axes: tuple[str | None, ...], format: Format) -> Format | None:
    """`format_of` a parameter with these logical axes."""
    if {"norm", "router"} & set(axes) or axes == EMBEDDING:
        return None
    return Format("fp8" if format.codes == "fp8" else "int8") if axes == HEAD else format


def quantize_model[Model: nnx.Module](model: Model, format: Format, dtype: jnp.dtype) -> Model:
    """The same model over quantised matrices (`quantize_params`); what both share is not copied."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, quantize_params(params, format, dtype), rest)


@partial(jax.jit, static_argnums=(1, 2))
def quantize_params(params: nnx.State, format: Format, dtype: jnp.dtype) -> nnx.State:
    """Trained parameters with every matrix rounded to the nearest codes, laid out over the mesh as before.

    Args:
        params: of a `Transformer`.
        format: of the matrices.
        dtype: compute precision.

    Raises:
        UserError: the format does not fit a matrix, or the mesh.
    """
    if format.dynamic and axis_size("tensor") > 1:
        raise UserError(
            f"mesh.tensor={axis_size('tensor')} leaves no device a whole token to round, as {format.codes} "
            "with dynamic=True does; set it to 1"
        )

    def one(_, variable: nnx.Variable, own: Format | None, clip):
        value, axes = variable[...], variable.get_metadata("out_sharding")
        if own is None:
            return value.astype(dtype) if axes == EMBEDDING else value

        def rounded(w, clip=None):
            return quantize(w, own, clip=clip)

        *leading, inputs, outputs = axes
        shapes = jax.eval_shape(rounded, jax.ShapeDtypeStruct(value.shape, value.dtype))
        layout = replace(
            shapes,
            values=_fitting(spec(*leading, outputs, inputs), shapes.values.shape),
            scales=_fitting(spec(*leading, outputs, None), shapes.scales.shape),
        )
        # Written without regard to the mesh: how groups and pairs fall over devices is XLA's business.
        laid_out: Callable = jax.sharding.auto_axes(rounded, out_sharding=layout)
        return laid_out(value, clip)

    return _each(params, format, one)


@partial(jax.jit, static_argnums=1)
def fake_quantize_params(params: nnx.State, format: Format, key: Key[Array, ""] | None = None) -> nnx.State:
    """Parameters of the values that quantised ones would have, to be trained through (`fake_quantize`).

    Args:
        params: of a `Transformer`.
        format: of the matrices.
        key: stochastic rounding.

    Raises:
        UserError: the format does not fit a matrix.
    """

    def one(index: int, variable: nnx.Variable, own: Format | None, clip):
        value = variable[...]
        if own is None:
            return value
        layout, noise = jax.typeof(value).sharding.spec, None
        if key is not None:
            own_key = jax.random.fold_in(key, index)
            noise = jax.random.uniform(own_key, value.shape, out_sharding=layout)

        def rounded(w, clip, noise):
            return fake_quantize(w, own, clip=clip, noise=noise)

        laid_out: Callable = jax.sharding.auto_axes(rounded, out_sharding=layout)
        return laid_out(value, clip, noise)

    return _each(params, format, one)


def pretend(quantization: Quantization) -> Callable[..., nnx.State] | None:
    """What training's forward passes see in the place of the parameters (`make_train_step`)."""
    if not quantization.train:
        return None

    def seen(params: nnx.State, step: Int[Array, ""], key: Key[Array, ""]) -> nnx.State:
        own_key = key if quantization.rounding == "stochastic" else None
        rounded = fake_quantize_params(params, quantization.format, own_key)
        if not quantization.begin:
            return rounded
        begun = step >= quantization.begin
        return jax.tree.map(lambda r, p: jnp.where(begun, r, p), rounded, params)

    return seen


def deployed(params: nnx.State, quantization: Quantization, dtype: jnp.dtype) -> nnx.State:
    """The parameters as a run that trains for quantised weights means them to be used: really quantised."""
    if not quantization.train:
        return params
    return quantize_params(params, replace(quantization.format, dynamic=False), dtype)


def add_clipping(model: nnx.Module, format: Format) -> None:
    """Give every matrix that is quantised a parameter NAME_clip [..., G, F] beside it, of ones."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        own = format_of(variable, format)
        if own is not None:
            *leading, inputs, outputs = variable.shape
            axes = (*variable.get_metadata("out_sharding")[:-2], None, "norm")
            clip = jnp.ones((*leading, own.groups(inputs), outputs), jnp.float32)
            holder: Any = model
            for name in path[:-1]:
                holder = holder[name] if isinstance(name, int) else getattr(holder, str(name))
            setattr(holder, f"{path[-1]}{CLIP}", nnx.Param(clip, out_sharding=axes))


def _each(params: nnx.State, format: Format, one: Callable) -> nnx.State:
    """`one` of every parameter: of its number, itself, its format and its learned clipping, if any."""
    flat = nnx.to_flat_state(params)
    by_path = dict(flat)
    fresh = []
    for index, (path, variable) in enumerate(flat):
        clip = by_path.get((*path[:-1], f"{path[-1]}{CLIP}"))
        value = one(index, variable, format_of(variable, format), None if clip is None else clip[...])
        fresh.append((path, variable.replace(value)))
    return nnx.from_flat_state(fresh)


def _fitting(layout: P, shape: tuple[int, ...]) -> P:
    """The layout, whole along axes that do not divide among their devices."""
    mesh = jax.sharding.get_abstract_mesh()

    def devices(axes) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(mesh.shape[name] for name in names)

    return P(*(axes if size % devices(axes) == 0 else None for axes, size in zip(layout, shape, strict=True)))
