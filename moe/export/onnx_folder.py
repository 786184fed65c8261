"""A run as an ONNX model with a cache of keys and values, which ONNX Runtime and onnxruntime-genai run.

    model.onnx, model.onnx.data     (input_ids, attention_mask, past) -> (logits, present)
    genai_config.json               what onnxruntime-genai asks for
    tokenizer.json, tokenizer_config.json

The graph is built from the model itself, not from an architecture of the Hugging Face hub, so any that its
operators can express is carried.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto

from moe.errors import UserError
from moe.export import onnx_products
from moe.export.architecture import differences, essence
from moe.export.assemble import ReadWeights
from moe.export.hugging_face import Text, write_tokenizer
from moe.export.onnx_graph import DATA, MODEL, Graph
from moe.export.onnx_layers import Layer
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig
from moe.nn.pattern import places
from moe.quant import Format
from moe.routing import TopK
from moe.routing.group_limited import GroupLimitedTopK

CARRIED = ("vocab_size", "width", "dense_width", "tied_embedding", "norm_epsilon")
CARRIED_OF_MOE = ("num_experts", "balance", "shared_experts", "shared_width", "shared_gate")


def check(model: TransformerConfig) -> None:
    """Refuse what the graph cannot express.

    Raises:
        UserError: one line naming the fields.
    """
    moe, attention = model.moe, model.attention
    same = {name: getattr(moe, name) for name in CARRIED_OF_MOE}
    if isinstance(moe.expert_width, int):
        same["expert_width"] = moe.expert_width
    if type(moe.routing) in (TopK, GroupLimitedTopK):
        same["routing"] = moe.routing
    expressed = TransformerConfig(
        **{name: getattr(model, name) for name in CARRIED},
        layers=model.layers.upper(),
        attention=attention if isinstance(attention, AttentionConfig) else AttentionConfig(),
        moe=replace(MoEConfig(balance=()), **same),
    )
    lacking = differences("model", essence(model), essence(expressed))
    if lacking:
        raise UserError(f"--to onnx has no operators for {' and '.join(lacking)}")
    if attention.head_width % 16 or attention.rotary_width % 16:
        raise UserError(
            f"ONNX Runtime's attention rotates multiples of 16 dimensions; model.attention.head_width="
            f"{attention.head_width}, of which {attention.rotary_width} are rotated"
        )


def write_onnx(
    folder: Path, model: TransformerConfig, read: ReadWeights, text: Text, *, name: str, format: Format | None
) -> None:
    """Write the folder; no more than one layer's experts are in memory.

    Args:
        folder: where to, empty.
        model: of the run.
        read: its weights.
        text: how it was fed.
        name: of the model.
        format: of matrices; None: float32. The embedding, routers and norms stay float32.

    Raises:
        UserError: the graph cannot express the model, or the format does not fit a matrix.
    """
    check(model)
    with (folder / DATA).open("wb") as data:
        graph = Graph(data)
        _model(graph, model, read, text.sequence_length, format)
        graph.save(folder / MODEL, name)
    ids = write_tokenizer(folder, text)
    config = json.dumps(_genai_config(model, text, ids), indent=2)
    (folder / "genai_config.json").write_text(config + "\n", encoding="utf-8")


def _model(
    graph: Graph, model: TransformerConfig, read: ReadWeights, length: int, format: Format | None
) -> None:
    def whole(leaf: str) -> np.ndarray:
        found = read(leaf, None)
        assert found is not None, leaf
        return found

    tokens = graph.input("input_ids", TensorProto.INT64, ("batch", "sequence"))
    assert isinstance(model.attention, AttentionConfig), "nothing else is carried"
    context = _context(graph, model.attention, length)
    cached = [f"{number}.{what}" for number in range(len(model.layers)) for what in ("key", "value")]
    heads, width = model.attention.kv_heads, model.attention.head_width
    for name in cached:
        graph.input(f"past_key_values.{name}", TensorProto.FLOAT, ("batch", heads, "past", width))
    embedding = whole("embedding")
    x = graph.add("Gather", graph.array("embedding", embedding), tokens)
    for number, (run, place, repetition) in enumerate(places(model.layers)):
        prefix = f"stacks/{run}/blocks/{place}/"
        layer = Layer(graph, model, number, lambda leaf, p=prefix, r=repetition: read(p + leaf, r), format)
        x = layer(x, context)
    scale = graph.array("final_norm/scale", whole("final_norm/scale"))
    x = graph.add("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=model.norm_epsilon, stash_type=1)
    head = embedding.T if model.tied_embedding else whole("head")
    logits = onnx_products.multiply(graph, x, "head", head, onnx_products.HEAD if format else None)
    graph.add_named("Identity", logits, outputs=["logits"])
    graph.output("logits", TensorProto.FLOAT, ("batch", "sequence", model.vocab_size))
    for name in cached:
        graph.output(f"present.{name}", TensorProto.FLOAT, ("batch", heads, "total", width))


def _context(graph: Graph, attention: AttentionConfig, length: int) -> dict[str, str]:
    """What attention must know of lengths and positions."""
    mask = graph.input("attention_mask", TensorProto.INT64, ("batch", "total"))
    attended = graph.add("ReduceSum", mask, graph.integers(1), keepdims=0)
    lengths = graph.add("Sub", attended, graph.integers(1))
    longest = graph.add("Squeeze", graph.add("Shape", mask, start=1))
    half = attention.rotary_width // 2
    # As `moe.nn.attention.rotate` has them, in float32 throughout.
    frequency = np.float32(attention.rope_theta) ** (-np.arange(half, dtype=np.float32) / half)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    return {
        "lengths": graph.add("Cast", lengths, to=TensorProto.INT32),
        "longest": graph.add("Cast", longest, to=TensorProto.INT32),
        "cos": graph.array("cos", np.cos(angle)) if half else "",
        "sin": graph.array("sin", np.sin(angle)) if half else "",
    }


def _genai_config(model: TransformerConfig, text: Text, ids: dict[str, int]) -> dict:
    """What onnxruntime-genai reads: names of inputs and outputs, shapes of the cache, how to search."""
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": model.attention.head_width,
        "hidden_size": model.width,
        "num_attention_heads": model.attention.heads,
        "num_key_value_heads": model.attention.kv_heads,
        "num_hidden_layers": len(model.layers),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    shape = {"vocab_size": model.vocab_size, "context_length": text.sequence_length}
    # Its kind of model says only that this is a decoder; what it computes is in the graph.
    described = {"type": "qwen3", "decoder": decoder} | ids | shape
    search = {"do_sample": True, "max_length": text.sequence_length, "past_present_share_buffer": True}
    return {"model": described, "search": search}
