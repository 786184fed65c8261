"""Parameters of the published configs as Hugging Face transformers counts them, by part.

    uv run --no-project tests/analysis/transformers_counts.py

writes transformers_counts.json beside this file, which test_published_counts.py compares with. Each model
is built whole, on torch's meta device, which allocates nothing. Three are the very models; the other two
configs are built from classes that have all their parts:

- deepseek_v3_style_16b: GLM-4-MoE's, which is DeepSeek-V3's mixture under plain grouped-query attention;
- switch_base_style: ERNIE-4.5-MoE's, whose mixtures alternate with dense layers.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["transformers==5.23.0", "torch==2.13.0"]
# ///

import json
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import Ernie4_5_MoeConfig, Glm4MoeConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

CONFIGS = {
    "olmoe_1b_7b": OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
    ),
    "qwen3_30b_a3b": Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "mixtral_8x7b": MixtralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "deepseek_v3_style_16b": Glm4MoeConfig(
        vocab_size=102_400,
        hidden_size=2048,
        intermediate_size=10_944,
        moe_intermediate_size=1408,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        use_qk_norm=False,
        attention_bias=False,
    ),
    "switch_base_style": Ernie4_5_MoeConfig(
        vocab_size=32_128,
        hidden_size=768,
        intermediate_size=2048,
        moe_intermediate_size=2048,
        num_hidden_layers=24,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        moe_num_experts=128,
        moe_k=1,
        moe_num_shared_experts=0,
        moe_layer_start_index=0,
        moe_layer_end_index=-1,
        moe_layer_interval=2,
        tie_word_embeddings=True,
        use_bias=False,
    ),
}

# The part of a parameter, by the first of these that its name contains.
PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "self_attn": "attention",
    "norm": "norms",
    "shared_expert": "shared experts",
    "experts.": "experts",
    "gate.weight": "router",
    "mlp": "dense",
}


def count(config) -> dict[str, int]:
    """Trained parameters of each part."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[next(part for within, part in PARTS.items() if within in name)] += parameter.numel()
    return dict(parts)


if __name__ == "__main__":
    found = {"transformers": transformers.__version__}
    found |= {name: {"class": type(c).__name__, "parameters": count(c)} for name, c in CONFIGS.items()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
