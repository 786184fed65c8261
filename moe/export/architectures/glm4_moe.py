"""GLM-4.5 (2508.06471): sigmoid scores with a bias in the choice, shared experts, dense first layers."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadNorm, HeadWidth, Rope
from moe.export.keys import BODY, HEADS, DenseFirst, Key
from moe.export.moe_keys import BiasedSigmoid, SharedCount
from moe.export.tensors import ATTENTION, DENSE, EXPERTS, MODEL, NORMS, SCORE_BIAS, feed_forward

GLM4_MOE = Architecture(
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(),
        Rope(fraction=0.5),
        HeadNorm(),
        Key("attention_bias", "attention.bias", False),
        DenseFirst(),
        Key("intermediate_size", "dense_width"),
        Key("n_routed_experts num_local_experts", "moe.num_experts"),
        Key("moe_intermediate_size", "moe.expert_width"),
        Key("num_experts_per_tok", "moe.routing.k"),
        Key("norm_topk_prob", "moe.routing.renormalize", True),
        Key("routed_scaling_factor", "moe.routing.scale", 1.0),
        BiasedSigmoid(),
        SharedCount(),
    ),
    tensors=(
        *MODEL,
        *NORMS,
        *ATTENTION,
        *DENSE,
        *EXPERTS,
        *SCORE_BIAS,
        *feed_forward("mlp.shared_experts", "moe/shared"),
    ),
    llama_cpp=LlamaCpp(
        "glm4moe",
        renormalizes=None,
        dense=True,
        renamed={"feed_forward_norm/scale": "post_attention_norm.weight"},
    ),
)
