"""In which of ggml's types each tensor of a GGUF file is stored.

Vectors, routers and the gates of shared experts stay float32. The mix of Q4_K_M is llama.cpp's own
(`llama_tensor_get_type_impl` of src/llama-quant.cpp): what has proved sensitive takes more bits.
"""

from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType, quants
from gguf.constants import GGML_QUANT_SIZES
from jaxtyping import Float

from moe.export import k_quants
from moe.export.tensors import Slot
from moe.nn import TransformerConfig

GgufType = Literal["float32", "float16", "q8_0", "q4_k_m"]
FILES = {
    "float32": LlamaFileType.ALL_F32,
    "float16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
PLAIN = {"float32": Kind.F32, "float16": Kind.F16, "q8_0": Kind.Q8_0}
FLOAT32 = {"moe/router/w", "moe/shared/w_shared_gate"}
"""Matrices that llama.cpp wants in float32, besides all vectors."""
NARROW = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""For rows that super-blocks of 256 do not divide: types with blocks of 32."""


def kind_of(slot: Slot, shape: tuple[int, ...], model: TransformerConfig, file: GgufType) -> Kind:
    """The type of a tensor.

    Args:
        slot: what it is.
        shape: of the tensor, rows last.
        model: that it is part of.
        file: what was asked for.
    """
    if slot.tensor.ours in FLOAT32 or len(shape) == 1:
        return Kind.F32
    kind = _mixed(slot, model) if file == "q4_k_m" else PLAIN[file]
    if shape[-1] % _block(kind):
        kind = NARROW.get(kind, Kind.F16)
    return kind if shape[-1] % _block(kind) == 0 else Kind.F16


def encode(x: Float[np.ndarray, "..."], kind: Kind) -> np.ndarray:
    """A tensor in a type: numbers, or bytes."""
    if kind in k_quants.ENCODERS:
        return k_quants.encode(x, kind)
    return quants.quantize(np.ascontiguousarray(x), kind)


def stored(shape: tuple[int, ...], kind: Kind) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of what `encode` gives."""
    if kind in (Kind.F32, Kind.F16):
        return shape, np.dtype(np.float32 if kind == Kind.F32 else np.float16)
    return quants.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8)


def _block(kind: Kind) -> int:
    return GGML_QUANT_SIZES[kind][0]


def _mixed(slot: Slot, model: TransformerConfig) -> Kind:
    eight_experts = model.moe_layers > 0 and model.moe.num_experts == 8
    name = slot.tensor.ours.rpartition("/")[2]
    if name == "head" or (name == "embedding" and model.tied_embedding):
        return Kind.Q6_K
    if slot.layer is None:
        return Kind.Q4_K
    if eight_experts and name in ("w_k", "w_v", "w_kv_up"):
        return Kind.Q8_0
    if eight_experts and name == "w_out":
        return Kind.Q5_K
    more_bits = _takes_more_bits(slot.layer, len(model.layers))
    return Kind.Q6_K if more_bits and name in ("w_v", "w_kv_up", "w_down") else Kind.Q4_K


def _takes_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
