"""GLM-4.5 (2508.06471): sigmoid scores with a bias in the choice, shared experts, dense first layers."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadNorm, HeadWidth, Rope
from moe.export.keys import BODY, HEADS, Key
from moe.export.moe_keys import sigmoid_mixture
from moe.export.tensors import ATTENTION, MODEL, NORMS, SIGMOID_MIXTURE

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
        *sigmoid_mixture(scale=1.0),
    ),
    tensors=(
        *MODEL,
        *NORMS,
        *ATTENTION,
        *SIGMOID_MIXTURE,
    ),
    llama_cpp=LlamaCpp(
        "glm4moe",
        renormalizes=None,
        dense=True,
        renamed={"feed_forward_norm/scale": "post_attention_norm.weight"},
    ),
)
