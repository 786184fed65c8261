"""A tiny model, its batch, and the outcome of one training step on any layout."""

from dataclasses import replace
from functools import cache, partial
from itertools import product
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from meshes import MESHES

from moe.dispatch import Dropless, Exchange, Gather
from moe.mesh import AXES, MeshConfig, make_mesh, spec
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig, build, structure
from moe.nn.quantized import pretend
from moe.quant import Quantization
from moe.routing import TopK
from moe.training.state import TrainState, split
from moe.training.step import make_train_step

VOCABULARY, BATCH, SEQUENCE, SLICES = 24, 32, 8, 3  # each of 8 devices gets one sequence of 4 micro-batches
MESH = {
    **{name: MeshConfig(fsdp=fsdp, expert=expert) for name, (fsdp, expert) in MESHES.items()},
    "data": MeshConfig(data=2, fsdp=2, expert=2),
    "tensor": MeshConfig(fsdp=2, expert=2, tensor=2),
    "sequence": MeshConfig(data=2, fsdp=1, expert=2, sequence=2),
    "all": MeshConfig(fsdp=1, expert=2, sequence=2, tensor=2),
}
# Every mesh of 8 devices, by its axes' lengths.
EIGHT = {
    "x".join(map(str, sizes)): MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    for sizes in product((1, 2, 4, 8), repeat=len(AXES))
    if prod(sizes) == 8
}
MESH |= EIGHT

BASE = TransformerConfig(
    vocab_size=VOCABULARY,
    width=16,
    layers="MM",
    attention=AttentionConfig(heads=16, kv_heads=8, head_width=4),
    moe=MoEConfig(
        num_experts=8, expert_width=8, routing=TopK(k=2), dispatch=Dropless(tile=8), shared_experts=1
    ),
    compute_dtype="float32",
)


class Layout(NamedTuple):
    """What must not matter."""

    mesh: str = "1x1"
    remat: str = "none"
    accumulation: int = 1
    chunks: int = 1
    exchange: Exchange = Gather()

    def set(self):
        """Context in which the mesh is set."""
        devices = 1 if self.mesh == "1x1" else 8
        return jax.set_mesh(make_mesh(MESH[self.mesh], jax.devices()[:devices]))


def with_moe(**fields):
    return replace(BASE, moe=replace(BASE.moe, **fields))


# An optimizer that moves nothing, and whose state is the gradient it saw last.
KEEP_GRADIENTS = optax.GradientTransformation(
    partial(jax.tree.map, jnp.zeros_like),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


@cache
def initial_values(config):
    """The model's parameters and controllers, as numpy arrays, made on one device; biases are random."""
    with Layout().set():
        _, params, controllers = split(build(config, jax.random.key(0)))
    params = with_changed(params, "router", lambda w: 3 * w)  # far from balance
    random = np.random.default_rng(0)
    controllers = with_changed(
        controllers, "bias", lambda b: random.normal(size=b.shape).astype(np.float32) / 10
    )
    return jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, controllers)


def with_changed(state, name, change):
    """The state with `change` made to each array under this name."""
    return jax.tree_util.tree_map_with_path(lambda path, x: change(x) if name in _names(path) else x, state)


def arrays_named(state, name):
    """The arrays under this name."""
    return [x for path, x in jax.tree_util.tree_leaves_with_path(state) if name in _names(path)]


def _names(path):
    return [getattr(key, "key", getattr(key, "name", None)) for key in path]


def place(config, params, controllers, optimizer) -> tuple:
    """The model's structure, and a state of these values, laid out on the mesh as a fresh model's."""
    graph, like = structure(config)
    mesh = jax.sharding.get_mesh()

    def put(value, like):
        return jax.device_put(np.array(value), jax.sharding.NamedSharding(mesh, like.sharding.spec))

    params = jax.tree.map(put, params, like)
    controllers = jax.tree.map(lambda b: jnp.array(b), controllers)
    zero = jnp.zeros((), jnp.int32)
    optimizer_state = optimizer.init(params)
    return graph, TrainState(zero, params, controllers, optimizer_state, None, zero + 0, zero + 0)


def make_batch(seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCABULARY, (BATCH, SEQUENCE + 1)).astype(np.int32)
    slices = random.integers(0, SLICES - 1, BATCH).astype(np.int32)  # the last slice stays empty
    return tokens, slices


def on_mesh(array):
    return jax.device_put(array, jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch")))


@cache
def _compiled(config, layout: Layout, quantization: Quantization):
    return make_train_step(
        structure(config)[0],
        KEEP_GRADIENTS,
        accumulation=layout.accumulation,
        chunks=layout.chunks,
        pretend=pretend(quantization),
    )


class Outcome(NamedTuple):
    """Of one step, as numpy arrays."""

    metrics: dict
    gradients: dict
    controllers: dict


def outcome(config, layout: Layout, key=0, quantization=Quantization(), **states) -> Outcome:  # noqa: B008
    """Of one step from the initial values; `states` replace those of the controllers' arrays by name."""
    params, controllers = initial_values(config)
    for name, value in states.items():
        controllers = with_changed(controllers, name, lambda x, v=value: np.broadcast_to(v, x.shape))
    moe = replace(config.moe, dispatch=replace(config.moe.dispatch, exchange=layout.exchange))
    config = replace(config, remat=layout.remat, moe=moe)
    with layout.set():
        _, state = place(config, params, controllers, KEEP_GRADIENTS)
        step = _compiled(config, layout, quantization)
        state, metrics = step(state, jax.random.key(key), *map(on_mesh, make_batch()), SLICES)
        return jax.device_get(Outcome(metrics, state.optimizer, state.controllers))


def distance(a, b) -> float:
    """Euclidean, between all arrays of two trees."""
    return float(optax.tree.norm(jax.tree.map(lambda a, b: a.astype(np.float64) - b, a, b)))


def assert_same(actual: Outcome, expected: Outcome):
    """Loss to 1e-6, gradients and states to 2e-6 of their norm; each metric and number to float32 rounding.

    One device that sums a batch in four parts is up to 1e-6 from itself already.
    """
    np.testing.assert_allclose(actual.metrics["loss"], expected.metrics["loss"], rtol=1e-6)
    for tree, like in zip(actual[1:], expected[1:], strict=True):
        assert distance(tree, like) <= 2e-6 * distance(like, jax.tree.map(np.zeros_like, like))
    assert actual.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(actual.metrics[name], value, rtol=2e-5, atol=2e-5, err_msg=name)

    def close(path, value, expected):
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, actual[1:], expected[1:])
