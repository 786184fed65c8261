"""Quantised matrices as the compressed-tensors package lays them out, which vLLM and transformers load.

In the place of NAME.weight [out, in] stand its codes and scales. 8-bit codes whose inputs are rounded too lie
as they are; all others lie in words of 32 bits, low bits first, each as code + 2^(bits - 1).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from moe.errors import UserError
from moe.export.safetensors_file import DTYPES, Entry
from moe.quant import Format

WORD = 32


def check_format(format: Format) -> None:
    """Refuse a format for which compressed-tensors has no words.

    Raises:
        UserError: it is such a one.
    """
    if WORD % format.bits or (format.group_size and format.group_size % (WORD // format.bits)):
        raise UserError(
            f"--quantize with group_size={format.group_size}: words of {WORD} bits hold "
            f"{WORD // format.bits} codes each; take a multiple of that"
        )


def entries(weight: str, shape: tuple[int, ...], format: Format) -> list[Entry]:
    """What stands in the place of a tensor.

    Args:
        weight: its name.
        shape: [out, in].
        format: of its codes.

    Raises:
        UserError: the inputs do not make whole groups.
    """
    outputs, inputs = shape
    scale = Entry(f"{weight}_scale", DTYPES["F32"], (outputs, format.groups(inputs)))
    if format.dynamic:
        return [Entry(weight, np.dtype(format.dtype), shape), scale]
    words = -(-inputs * format.bits // WORD)
    packed = Entry(f"{weight}_packed", np.dtype(np.int32), (outputs, words))
    return [packed, scale, Entry(f"{weight}_shape", np.dtype(np.int64), (2,))]


def tensors(codes: np.ndarray, scales: np.ndarray, format: Format) -> list[np.ndarray]:
    """The same tensors' content.

    Args:
        codes: [out, in].
        scales: [out, groups].
        format: of the codes.
    """
    scales = scales.astype(np.float32)
    if format.dynamic:
        return [codes, scales]
    return [pack(codes, format.bits), scales, np.array(codes.shape)]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[out, in] codes of 4 or 8 bits -> int32 [out, words]; what is left of the last word is zero."""
    spare = -codes.shape[1] % (WORD // bits)
    shifted = np.pad((codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8), ((0, 0), (0, spare)))
    if bits == 4:
        shifted = shifted[:, ::2] | (shifted[:, 1::2] << 4)
    return np.ascontiguousarray(shifted).view("<i4")


def quantization_config(format: Format, plain: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        format: of the matrices.
        plain: names of the matrices that stay as they are, without `.weight`.
    """
    kind = "float" if format.codes == "fp8" else "int"
    numbers = {"num_bits": format.bits, "type": kind, "symmetric": True}
    strategy = {"strategy": "group", "group_size": format.group_size}
    weights = numbers | (strategy if format.group_size else {"strategy": "channel"}) | {"dynamic": False}
    inputs = numbers | {"strategy": "token", "dynamic": True}
    layout = f"{kind}-quantized" if format.dynamic else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "format": layout,
        "weights": weights,
        "input_activations": inputs if format.dynamic else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(plain),
        "kv_cache_scheme": None,
    }
