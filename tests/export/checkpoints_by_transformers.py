"""Runs where transformers is: writes a tiny random checkpoint of each architecture, and what it answers.

python checkpoints_by_transformers.py CLIENTS FOLDER

FOLDER/prompts.npy is asked. FOLDER/NAME/ is the checkpoint with one tensor an expert, FOLDER/NAME-fused/ that
with fused experts, FOLDER/NAME.npz the answer. Where FOLDER/NAME-again/ lies, it is asked instead of anything
being written, and FOLDER/NAME-again.npz is its answer.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, sys.argv[1])
from run_transformers import answer

NEW_TOKENS = 4
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}

CONFIGS = {
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SHAPE,
        **EXPERTS,
        head_dim=16,
        num_experts=4,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
        rope_theta=500.0,
    ),
    "glm4_moe": transformers.Glm4MoeConfig(
        **SHAPE,
        **EXPERTS,
        **GROUPS,
        head_dim=16,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "olmoe": transformers.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SHAPE, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4},
        **EXPERTS,
        **GROUPS,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SHAPE),
}


def main() -> None:
    """Write and answer, or only answer."""
    transformers.logging.set_verbosity_error()
    folder = Path(sys.argv[2])
    prompts = np.load(folder / "prompts.npy")
    for name, config in CONFIGS.items():
        again = folder / f"{name}-again"
        asked = again if again.exists() else folder / name
        if not again.exists():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # norms and biases too, which start at one and zero
                for tensor in (*model.parameters(), *buffers(model)):
                    tensor.add_(0.2 * torch.randn_like(tensor))
            model.save_pretrained(asked)
            model.save_pretrained(folder / f"{name}-fused", save_original_format=False)
        np.savez(folder / f"{asked.name}.npz", **answer(str(asked), prompts, NEW_TOKENS))


def buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """The biases of the choice."""
    return [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]


if __name__ == "__main__":
    main()
