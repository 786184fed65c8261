"""The model: attention, experts, the MoE layer, the transformer."""

from moe.nn.attention import AttentionConfig
from moe.nn.free_experts import FreeExperts
from moe.nn.latent_attention import LatentAttentionConfig
from moe.nn.layout import check_layout
from moe.nn.moe_config import MoEConfig
from moe.nn.moe_layer import MoELayer
from moe.nn.router import CosineRouter, LinearRouter, MLPRouter, Router
from moe.nn.transformer import Transformer, TransformerConfig, build, structure
from moe.nn.upcycle import Continue, Init, Upcycle

__all__ = [
    "AttentionConfig",
    "Continue",
    "CosineRouter",
    "FreeExperts",
    "Init",
    "LatentAttentionConfig",
    "LinearRouter",
    "MLPRouter",
    "MoEConfig",
    "MoELayer",
    "Router",
    "Transformer",
    "TransformerConfig",
    "Upcycle",
    "build",
    "check_layout",
    "structure",
]
