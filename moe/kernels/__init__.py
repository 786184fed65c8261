"""Kernels: one op a file, each beside its plain-JAX reference; the platform is chosen inside the op."""

from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.grouped_matmul import grouped_matmul
from moe.kernels.groups import Groups, rows_needed
from moe.kernels.linear import linear
from moe.kernels.linear_cross_entropy import linear_cross_entropy
from moe.kernels.linear_float32 import linear_float32
from moe.kernels.merge import from_groups, merge, split, to_groups
from moe.kernels.permute import Plan, assignment_rows, combine_rows, gather_rows
from moe.kernels.routed_mlp import routed_mlp
from moe.kernels.touched_mlp import touched_mlp

__all__ = [
    "Groups",
    "Plan",
    "assignment_rows",
    "combine_rows",
    "expert_mlp",
    "from_groups",
    "gather_rows",
    "grouped_matmul",
    "linear",
    "linear_cross_entropy",
    "linear_float32",
    "merge",
    "routed_mlp",
    "rows_needed",
    "split",
    "to_groups",
    "touched_mlp",
]
