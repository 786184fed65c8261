"""Qwen3, dense (2505.09388): a norm on each head's queries and keys."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadWidth, Rope
from moe.export.keys import BODY, HEADS, AllOfOneKind, Always, Field, Key
from moe.export.tensors import ATTENTION, DENSE, MODEL, NORMS

QWEN3 = Architecture(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(),
        Rope(),
        Field("attention.qk_norm", "head"),
        Always("attention_bias", False),
        Always("use_sliding_window", False),
        AllOfOneKind("D"),
        Key("intermediate_size", "dense_width"),
    ),
    tensors=(*MODEL, *NORMS, *ATTENTION, *DENSE),
    llama_cpp=LlamaCpp("qwen3", renormalizes=None, dense=True),
)
