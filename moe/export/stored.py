"""The weights of a run as a checkpoint stores them: all of one precision, or the matrices quantised."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from moe.export import compressed_tensors
from moe.export.architecture import Architecture
from moe.export.assemble import ReadWeights
from moe.export.safetensors_file import DTYPES, Entry
from moe.export.tensors import Slot, slots
from moe.nn import TransformerConfig, build
from moe.nn.quantized import HEAD, format_of
from moe.quant import Format, QuantizedMatrix, dequantize, quantize

Precision = Literal["float32", "bfloat16", "float16"]
ReadCodes = Callable[[str, int | None], QuantizedMatrix | None]
"""As `ReadWeights`, of quantised matrices; None for any other parameter."""


class StoredWeights:
    """What is stored of each parameter; no more than one layer's part of one is in memory.

    Quantised are the matrices of attention, feed-forwards and experts, from the run's own float32, or as the
    run holds them. Routers, gates of shared experts, embedding and output head are plain, as engines expect.

    Args:
        architecture: one that carries the model.
        model: of the run.
        read: its weights.
        precision: of all that is not quantised.
        quantized: format of the matrices; None quantises nothing.
        codes: the run's own quantised matrices, of that format, where it holds such.
    """

    def __init__(
        self,
        architecture: Architecture,
        model: TransformerConfig,
        read: ReadWeights,
        precision: Precision = "float32",
        quantized: Format | None = None,
        codes: ReadCodes | None = None,
    ):
        whole = architecture.whole(architecture.config(model))
        self.architecture = architecture
        """That carries the model."""
        self.config: dict[str, Any] = architecture.config(model) | {"dtype": precision}
        """The keys of config.json about the model and its numbers."""
        self.slots = slots(architecture.tensors, whole)
        """All that is stored, in order."""
        self._read, self._codes, self._dtype = read, codes, np.dtype(precision)
        self._format, self._matrices = quantized, _matrices(whole) if quantized else set()
        self._kept = {slot.leaf for slot in self.slots if slot.tensor.float32}
        if quantized:
            in_layers = (slot for slot in self.slots if slot.layer is not None and len(slot.their_shape) == 2)
            plain = [name for slot in in_layers if slot.leaf not in self._matrices for name in slot.names]
            self.config["quantization_config"] = compressed_tensors.quantization_config(
                quantized, ["lm_head", *(name.removesuffix(".weight") for name in plain)]
            )

    def entries(self, slot: Slot) -> list[Entry]:
        """Names and shapes of what stands for a parameter.

        Raises:
            UserError: the format does not fit it.
        """
        if self._format and slot.leaf in self._matrices:
            shape, format = slot.their_shape, self._format
            return [e for name in slot.names for e in compressed_tensors.entries(name, shape, format)]
        dtype = DTYPES["F32"] if slot.leaf in self._kept else self._dtype
        return [Entry(name, dtype, slot.their_shape) for name in slot.names]

    def tensors(self, slot: Slot) -> Iterator[np.ndarray]:
        """Their content."""
        array = self._read(slot.leaf, slot.repetition)
        if array is None:  # a part that this architecture always has and our model has not
            array = np.broadcast_to(np.float32(0), slot.shape)
        if not self._format or slot.leaf not in self._matrices:
            yield from slot.to_theirs(array)
            return
        held = self._codes(slot.leaf, slot.repetition) if self._codes else None
        matrix = held or _quantized(array, self._format)
        # Codes lie [..., out, in] as theirs do, so there is nothing to transpose.
        codes, scales = np.asarray(matrix.codes()), np.asarray(matrix.scales)
        for one, its in zip(_listed(codes), _listed(scales), strict=True):
            yield from compressed_tensors.tensors(one, its, self._format)

    def read(self, leaf: str, place: int | None) -> np.ndarray | None:
        """What is stored stands for, float32 (`moe.export.assemble.ReadWeights`)."""
        array = self._read(leaf, place)
        if array is None or leaf in self._kept:
            return array
        if self._format and leaf in self._matrices:
            held = self._codes(leaf, place) if self._codes else None
            return np.asarray(dequantize(held or _quantized(array, self._format)))
        return array.astype(self._dtype).astype(np.float32)


def _listed(matrices: np.ndarray) -> np.ndarray:
    """[..., out, in] -> [n, out, in]: one matrix, or those of all experts."""
    return matrices.reshape(-1, *matrices.shape[-2:])


def _matrices(model: TransformerConfig) -> set[str]:
    """Names of the parameters that are quantised."""
    params = nnx.state(jax.eval_shape(lambda: build(model, jax.random.key(0))), nnx.Param)
    return {
        "/".join(map(str, path))
        for path, variable in nnx.to_flat_state(params)
        if format_of(variable, Format()) and variable.get_metadata("out_sharding") != HEAD
    }


_quantized = jax.jit(quantize, static_argnums=1)
