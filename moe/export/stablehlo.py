"""A run as a StableHLO program, which any process with JAX runs without our code: CPU, NVIDIA GPU, TPU.

    model.stablehlo       the forward pass, by `jax.export`: (weights, tokens [b, S]) -> logits [b, S, V]
    weights.safetensors   its first argument, by our names, stacked by layer
    tokenizer.json

The batch b is symbolic: one program serves every batch, a sequence after the other. The length S is that of
training; what stands behind a token changes nothing before it, so shorter texts are padded with anything.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe.dispatch import Dropless
from moe.export.assemble import ReadWeights
from moe.export.hugging_face import Text
from moe.export.safetensors_file import Entry, SafetensorsWriter
from moe.export.stored import Precision
from moe.mesh import MeshConfig, make_mesh
from moe.nn import TransformerConfig, build

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS = "model.stablehlo", "weights.safetensors"


def write_stablehlo(
    folder: Path, model: TransformerConfig, read: ReadWeights, text: Text, *, precision: Precision
) -> None:
    """Write program, weights and tokenizer; no more than one layer's part of a parameter is in memory.

    Args:
        folder: where to, empty.
        model: of the run.
        read: its weights.
        text: how it was fed.
        precision: of the weights, and in which matrices are multiplied.
    """
    program = export_program(model, text.sequence_length, precision)
    (folder / PROGRAM).write_bytes(program.serialize())
    shapes = _state(model)
    entries = [Entry(name, _dtype(name, precision), leaf.shape) for name, leaf in shapes.items()]
    with SafetensorsWriter(folder, entries, shard_bytes=2**63) as writer:
        for name, leaf in shapes.items():
            writer.write(_parts(name, leaf, read))
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    shutil.copyfile(text.tokenizer, folder / "tokenizer.json")


def export_program(model: TransformerConfig, length: int, precision: Precision) -> jax.export.Exported:
    """The forward pass for all platforms, with weights as arguments and a symbolic batch."""
    moe = replace(model.moe, dispatch=Dropless(tile=32))
    compute = "bfloat16" if precision == "bfloat16" else "float32"
    plain = replace(model, compute_dtype=compute, remat="none", moe=moe)
    weights = {
        name: jax.ShapeDtypeStruct(leaf.shape, _dtype(name, precision))
        for name, leaf in _state(plain).items()
    }

    def logits(weights: dict[str, Array], tokens: Int[Array, " S"]) -> Float[Array, "S V"]:
        graph, state = nnx.split(jax.eval_shape(lambda: build(plain, jax.random.key(0))))
        values = [weights[name] for name in _state(plain)]
        transformer = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), values))
        return transformer.logits(transformer(tokens[None])[0])[0]

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
        sequence = jax.export.export(jax.jit(logits), platforms=PLATFORMS)(weights, tokens)

    def each(weights: dict[str, Array], tokens: Int[Array, "b S"]) -> Float[Array, "b S V"]:
        return jax.lax.map(lambda row: sequence.call(weights, row), tokens)

    # The layouts that a mesh gives to all values, sizes too, keep JAX from filling in a symbolic one.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        tokens = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), length), jnp.int32)
        return jax.export.export(jax.jit(each), platforms=PLATFORMS)(weights, tokens)


def _state(model: TransformerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """All that a model computes with, in the order of its state: parameters, controllers, strategies."""
    _, state = nnx.split(jax.eval_shape(lambda: build(model, jax.random.key(0))))
    return {
        "/".join(map(str, path)): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, variable in nnx.to_flat_state(state)
    }


def _dtype(name: str, precision: Precision) -> np.dtype:
    """Of a parameter; what controllers and strategies remember decides routes and stays float32."""
    remembered = "controller_state" in name or "strategy_state" in name
    return np.dtype(jnp.dtype("float32" if remembered else precision))


def _parts(name: str, leaf: jax.ShapeDtypeStruct, read: ReadWeights) -> Iterator[np.ndarray]:
    """A parameter, layer after layer where it is stacked."""
    for place in range(leaf.shape[0]) if name.startswith("stacks") else [None]:
        part = read(name, place)
        assert part is not None, name
        yield part
