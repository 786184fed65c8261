"""Kernels for Hopper GPUs (H100, H200), in Pallas Mosaic GPU."""

from moe.kernels.hopper.few_rows import few_rows_fit, few_rows_product, few_rows_swiglu, few_rows_tile
from moe.kernels.hopper.gather import gathers_first
from moe.kernels.hopper.int8_products import int8_product, int8_swiglu
from moe.kernels.hopper.pipeline import Tiles
from moe.kernels.hopper.row_products import inward_transposed, product, swiglu_backward, swiglu_product
from moe.kernels.hopper.target import fits
from moe.kernels.hopper.weight_gradient import weight_gradient

__all__ = [
    "Tiles",
    "few_rows_fit",
    "few_rows_product",
    "few_rows_swiglu",
    "few_rows_tile",
    "fits",
    "gathers_first",
    "int8_product",
    "int8_swiglu",
    "inward_transposed",
    "product",
    "swiglu_backward",
    "swiglu_product",
    "weight_gradient",
]
