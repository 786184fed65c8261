"""Number formats of quantised matrices: int8, int4 in groups, fp8; there, back, and pretended."""

from moe.quant.config import Quantization
from moe.quant.fake import fake_quantize
from moe.quant.format import FORMATS, Format, format_named
from moe.quant.matrix import QuantizedMatrix, dequantize, find_scales, quantize, rescale, round_to
from moe.quant.rows import quantize_rows, split_rows

__all__ = [
    "FORMATS",
    "Format",
    "Quantization",
    "QuantizedMatrix",
    "dequantize",
    "fake_quantize",
    "find_scales",
    "format_named",
    "quantize",
    "quantize_rows",
    "rescale",
    "round_to",
    "split_rows",
]
