"""OLMoE (2409.02060): softmax scores, one norm over all heads' queries and one over their keys."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadWidth, Rope
from moe.export.keys import BODY, HEADS, AllOfOneKind, Always, Field, Key
from moe.export.tensors import ATTENTION, EXPERTS, MODEL, NORMS

OLMOE = Architecture(
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(written=False),
        Rope(),
        Field("attention.qk_norm", "full"),
        Always("attention_bias", False),
        Always("clip_qkv", None),
        AllOfOneKind(),
        Key("num_experts", "moe.num_experts"),
        Key("intermediate_size", "moe.expert_width"),
        Key("num_experts_per_tok", "moe.routing.k"),
        Key("norm_topk_prob", "moe.routing.renormalize", False),
    ),
    tensors=(*MODEL, *NORMS, *ATTENTION, *EXPERTS),
    llama_cpp=LlamaCpp("olmoe", renormalizes=False, whole_heads=True, whole_keys=True, own_head=True),
)
