"""Llama (2302.13971): no norm on queries and keys, no biases."""

from moe.export.architecture import Architecture, LlamaCpp
from moe.export.attention_keys import HeadWidth, Rope
from moe.export.keys import BODY, HEADS, AllOfOneKind, Always, Key
from moe.export.tensors import ATTENTION, DENSE, MODEL, NORMS

LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    keys=(
        *BODY,
        *HEADS,
        HeadWidth(),
        Rope(),
        Always("attention_bias", False),
        Always("mlp_bias", False),
        AllOfOneKind("D"),
        Key("intermediate_size", "dense_width"),
    ),
    tensors=(*MODEL, *NORMS, *ATTENTION, *DENSE),
    llama_cpp=LlamaCpp("llama", renormalizes=None, dense=True, interleaved=True),
)
