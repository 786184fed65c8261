"""Qwen2, dense (2407.10671): biases on queries, keys and values."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadWidth, Rope
from moe.export.keys import BODY, HEADS, AllOfOneKind, Always, Field, Key
from moe.export.tensors import ATTENTION, DENSE, MODEL, NORMS

QWEN2 = Architecture(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(),
        Rope(),
        Field("attention.bias", True),
        Always("use_sliding_window", False),
        AllOfOneKind("D"),
        Key("intermediate_size", "dense_width"),
    ),
    tensors=(*MODEL, *NORMS, *ATTENTION, *DENSE),
    llama_cpp=LlamaCpp("qwen2", renormalizes=None, dense=True, whole_heads=True),
)
