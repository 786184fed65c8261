"""Mixtral (2401.04088): softmax scores of the chosen experts, no norm on queries and keys."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadWidth, Rope
from moe.export.keys import BODY, HEADS, AllOfOneKind, Always, Field, Key
from moe.export.tensors import (
    ATTENTION,
    FUSED_DOWN,
    FUSED_GATE,
    FUSED_UP,
    MODEL,
    NORMS,
    TRANSPOSED,
    Tensor,
)

EXPERT = "block_sparse_moe.experts.{expert}"

MIXTRAL = Architecture(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(),
        Rope(theta=1_000_000.0),
        Always("sliding_window", None),
        AllOfOneKind(),
        Key("num_local_experts", "moe.num_experts"),
        Key("intermediate_size", "moe.expert_width"),
        Key("num_experts_per_tok", "moe.routing.k"),
        Field("moe.routing.renormalize", True),
    ),
    tensors=(
        *MODEL,
        *NORMS,
        *ATTENTION,
        Tensor("block_sparse_moe.gate.weight", "moe/router/w", TRANSPOSED, also="mlp.gate.weight"),
        Tensor(f"{EXPERT}.w1.weight", "moe/experts/w_gate", TRANSPOSED, fused=FUSED_GATE),
        Tensor(f"{EXPERT}.w3.weight", "moe/experts/w_up", TRANSPOSED, fused=FUSED_UP),
        Tensor(f"{EXPERT}.w2.weight", "moe/experts/w_down", TRANSPOSED, fused=FUSED_DOWN),
    ),
    llama_cpp=LlamaCpp("llama", renormalizes=True, interleaved=True),
)
