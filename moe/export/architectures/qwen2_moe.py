"""Qwen2-MoE (2407.10671): softmax scores, a gated shared expert, biases on queries, keys and values."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadWidth, Rope
from moe.export.keys import BODY, HEADS, Always, DenseAnywhere, Key
from moe.export.moe_keys import SharedWidth
from moe.export.tensors import ATTENTION, DENSE, EXPERTS, MODEL, NORMS, TRANSPOSED, Tensor, feed_forward

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(),
        Rope(),
        Key("qkv_bias", "attention.bias", True),
        Always("use_sliding_window", False),
        DenseAnywhere(),
        Key("intermediate_size", "dense_width"),
        Key("num_experts", "moe.num_experts"),
        Key("moe_intermediate_size", "moe.expert_width"),
        Key("num_experts_per_tok", "moe.routing.k"),
        Key("norm_topk_prob", "moe.routing.renormalize", False),
        SharedWidth(),
    ),
    tensors=(
        *MODEL,
        *NORMS,
        *ATTENTION,
        *DENSE,
        *EXPERTS,
        *feed_forward("mlp.shared_expert", "moe/shared"),
        Tensor("mlp.shared_expert_gate.weight", "moe/shared/w_shared_gate", TRANSPOSED),
    ),
    llama_cpp=LlamaCpp("qwen2moe", renormalizes=False, whole_heads=True, own_head=True),
)
