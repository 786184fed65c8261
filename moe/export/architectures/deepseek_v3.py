"""DeepSeek-V3 (2412.19437): latent attention, sigmoid scores with a bias in the choice, groups of experts."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import Latents, Rope
from moe.export.keys import BODY, Always
from moe.export.moe_keys import sigmoid_mixture
from moe.export.tensors import MODEL, NORMS, SIGMOID_MIXTURE, TRANSPOSED, Tensor

LATENT_ATTENTION = (
    Tensor("self_attn.q_proj.weight", "attention/w_q", TRANSPOSED),
    Tensor("self_attn.q_a_proj.weight", "attention/w_q_down", TRANSPOSED),
    Tensor("self_attn.q_a_layernorm.weight", "attention/q_norm/scale"),
    Tensor("self_attn.q_b_proj.weight", "attention/w_q_up", TRANSPOSED),
    Tensor("self_attn.kv_a_proj_with_mqa.weight", "attention/w_kv_down", TRANSPOSED),
    Tensor("self_attn.kv_a_layernorm.weight", "attention/kv_norm/scale"),
    Tensor("self_attn.kv_b_proj.weight", "attention/w_kv_up", TRANSPOSED),
    Tensor("self_attn.o_proj.weight", "attention/w_out", TRANSPOSED),
)

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    keys=(
        *BODY,
        Latents(),
        Rope(),
        Always("attention_bias", False),
        Always("rms_norm_eps", 1e-6),  # transformers has no other one in the latents' norms
        *sigmoid_mixture(scale=2.5),
    ),
    tensors=(
        *MODEL,
        *NORMS,
        *LATENT_ATTENTION,
        *SIGMOID_MIXTURE,
    ),
    llama_cpp=LlamaCpp(
        "deepseek2",
        renormalizes=None,
        dense=True,
        renamed={"attention/q_norm/scale": "attn_q_a_norm.weight"},
    ),
)
