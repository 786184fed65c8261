"""Qwen3-MoE (2505.09388): softmax scores, a norm on each head's queries and keys."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadWidth, Rope
from moe.export.keys import BODY, HEADS, Always, DenseAnywhere, Field, Key
from moe.export.tensors import ATTENTION, DENSE, EXPERTS, MODEL, NORMS

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(),
        Rope(),
        Field("attention.qk_norm", "head"),
        Always("attention_bias", False),
        Always("use_sliding_window", False),
        DenseAnywhere(),
        Key("intermediate_size", "dense_width"),
        Key("num_experts num_local_experts", "moe.num_experts"),
        Key("moe_intermediate_size", "moe.expert_width"),
        Key("num_experts_per_tok", "moe.routing.k"),
        Key("norm_topk_prob", "moe.routing.renormalize", False),
    ),
    tensors=(*MODEL, *NORMS, *ATTENTION, *DENSE, *EXPERTS),
    llama_cpp=LlamaCpp("qwen3moe", renormalizes=True),
)
