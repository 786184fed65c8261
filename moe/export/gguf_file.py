"""A run as one GGUF file, which llama.cpp loads.

llama.cpp builds each architecture's graph in code of its own, so some of what config.json says elsewhere is
fixed there; `LlamaCpp` of an architecture says what, and a model that differs is refused.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_VERSION, ExpertGatingFuncType

from moe.errors import UserError
from moe.export.architecture import Architecture
from moe.export.assemble import ReadWeights
from moe.export.gguf_types import FILES, GgufType, encode, kind_of, stored
from moe.export.hugging_face import Text
from moe.export.tensors import Slot, slots
from moe.nn import LatentAttentionConfig, TransformerConfig
from moe.routing import TopK
from moe.routing.group_limited import GroupLimitedTopK

NAMES = {
    "embedding": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head": "output.weight",
    "attention_norm/scale": "attn_norm.weight",
    "attention/w_q": "attn_q.weight",
    "attention/w_k": "attn_k.weight",
    "attention/w_v": "attn_v.weight",
    "attention/w_out": "attn_output.weight",
    "attention/b_q": "attn_q.bias",
    "attention/b_k": "attn_k.bias",
    "attention/b_v": "attn_v.bias",
    "attention/q_norm/scale": "attn_q_norm.weight",
    "attention/k_norm/scale": "attn_k_norm.weight",
    "attention/w_q_down": "attn_q_a.weight",
    "attention/w_q_up": "attn_q_b.weight",
    "attention/w_kv_down": "attn_kv_a_mqa.weight",
    "attention/w_kv_up": "attn_kv_b.weight",
    "attention/kv_norm/scale": "attn_kv_a_norm.weight",
    "feed_forward_norm/scale": "ffn_norm.weight",
    "dense/w_gate": "ffn_gate.weight",
    "dense/w_up": "ffn_up.weight",
    "dense/w_down": "ffn_down.weight",
    "moe/router/w": "ffn_gate_inp.weight",
    "moe/controller_state/bias": "exp_probs_b.bias",
    "moe/experts/w_gate": "ffn_gate_exps.weight",
    "moe/experts/w_up": "ffn_up_exps.weight",
    "moe/experts/w_down": "ffn_down_exps.weight",
    "moe/shared/w_gate": "ffn_gate_shexp.weight",
    "moe/shared/w_up": "ffn_up_shexp.weight",
    "moe/shared/w_down": "ffn_down_shexp.weight",
    "moe/shared/w_shared_gate": "ffn_gate_inp_shexp.weight",
}


def check(architecture: Architecture, model: TransformerConfig) -> None:
    """Refuse what llama.cpp does otherwise.

    Raises:
        UserError: one line naming the field.
    """
    theirs, name = architecture.llama_cpp, f"llama.cpp's {architecture.llama_cpp.name}"
    renormalize = getattr(model.moe.routing, "renormalize", None)
    if theirs.renormalizes is not None and renormalize != theirs.renormalizes:
        raise UserError(
            f"{name} always has model.moe.routing.renormalize={theirs.renormalizes}, not {renormalize}"
        )
    if not theirs.dense and "D" in model.layers:
        raise UserError(f"{name} has no dense layers; model.layers={model.layers}")
    if theirs.own_head and model.tied_embedding:
        raise UserError(f"{name} has an output head of its own; model.tied_embedding=True")
    if isinstance(model.attention, LatentAttentionConfig) and not model.attention.query_rank:
        raise UserError(f"{name} makes queries from a latent; model.attention.query_rank=0")
    attention = model.attention
    for must, what in ((theirs.whole_heads, "heads"), (theirs.whole_keys, "kv_heads")):
        width = getattr(attention, what) * attention.head_width
        if must and width != model.width:
            raise UserError(
                f"{name} wants model.attention.{what} as wide as the model together; they are {width} of "
                f"{model.width}"
            )


def write_gguf(
    path: Path,
    architecture: Architecture,
    model: TransformerConfig,
    read: ReadWeights,
    text: Text,
    *,
    name: str,
    precision: GgufType,
) -> None:
    """Write the file; no more than a layer's largest matrix is in memory.

    Args:
        path: of the file.
        architecture: one that carries the model.
        model: of the run.
        read: its weights.
        text: how it was fed.
        name: of the model.
        precision: of the matrices (`moe.export.gguf_types`).

    Raises:
        UserError: llama.cpp does something otherwise, or does not know the tokenizer.
    """
    check(architecture, model)
    whole = architecture.whole(architecture.config(model))
    carried = slots(architecture.tensors, whole)
    writer = GGUFWriter(path, architecture.llama_cpp.name)
    writer.add_name(name)
    writer.add_file_type(FILES[precision])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_model(writer, architecture, whole, text.sequence_length)
    _add_tokenizer(writer, text, model.vocab_size)
    kinds = [kind_of(slot, _shape(slot), whole, precision) for slot in carried]
    for slot, kind in zip(carried, kinds, strict=True):
        shape, dtype = stored(_shape(slot), kind)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(_name(slot, architecture), shape, dtype, nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for slot, kind in zip(carried, kinds, strict=True):
        array = read(slot.leaf, slot.repetition)
        array = np.zeros(slot.shape, np.float32) if array is None else array
        array = slot.tensor.layout.to_theirs(array).reshape(_shape(slot))
        if architecture.llama_cpp.interleaved and slot.tensor.ours in ("attention/w_q", "attention/w_k"):
            array = _interleaved(array, model.attention.head_width)
        writer.write_tensor_data(encode(array, kind))
    writer.close()


def _interleaved(w: np.ndarray, head_width: int) -> np.ndarray:
    """Rows of each head [out, in] in the order in which rotary positions pair neighbours, not halves."""
    return w.reshape(-1, 2, head_width // 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def _name(slot: Slot, architecture: Architecture) -> str:
    name = architecture.llama_cpp.renamed.get(slot.tensor.ours, NAMES[slot.tensor.ours])
    return name if slot.layer is None else f"blk.{slot.layer}.{name}"


def _shape(slot: Slot) -> tuple[int, ...]:
    shape = slot.tensor.layout.to_theirs(np.broadcast_to(np.float32(0), slot.shape)).shape
    return shape[1:] if shape[0] == 1 else shape  # the one row of a gate


def _add_model(writer: GGUFWriter, architecture: Architecture, model: TransformerConfig, length: int) -> None:
    attention, moe, routing = model.attention, model.moe, model.moe.routing
    assert isinstance(routing, TopK), "no other strategy is carried"
    width = moe.width_classes[0][1]
    writer.add_block_count(len(model.layers))
    writer.add_context_length(length)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.dense_width if architecture.llama_cpp.dense else width)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_width)
    writer.add_value_length(attention.value_width)
    if isinstance(attention, LatentAttentionConfig):
        writer.add_q_lora_rank(attention.query_rank)
        writer.add_kv_lora_rank(attention.kv_rank)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_freq_base(attention.rope_theta)
    writer.add_rope_dimension_count(attention.rotary_width)
    writer.add_vocab_size(model.vocab_size)
    if not model.moe_layers:
        return
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(routing.k)
    writer.add_expert_feed_forward_length(width)
    if moe.shared_gate != "none":
        writer.add_expert_shared_feed_forward_length(moe.shared_hidden)
    if moe.controller:
        writer.add_leading_dense_block_count(len(model.layers) - len(model.layers.lstrip("D")))
        writer.add_expert_shared_count(moe.shared_hidden // width)
        writer.add_expert_weights_scale(routing.scale)
        writer.add_expert_weights_norm(routing.renormalize)
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if isinstance(routing, GroupLimitedTopK):
        writer.add_expert_group_count(routing.num_groups)
        writer.add_expert_group_used_count(routing.kept_groups)


def _add_tokenizer(writer: GGUFWriter, text: Text, vocab_size: int) -> None:
    content: dict[str, Any] = json.loads(text.tokenizer.read_text(encoding="utf-8"))
    before = content.get("pre_tokenizer") or {}
    if content["model"]["type"] != "BPE" or before.get("type") != "ByteLevel":
        raise UserError(
            "llama.cpp cuts text by rules of its own; only byte-level BPE with GPT-2's rule is written "
            f"(this tokenizer: {content['model']['type']}, {before.get('type')})"
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(text.tokenizer))
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    end = tokenizer.token_to_id(text.end_of_text)
    assert end is not None, "training asked for this token"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp wants at least one; what this one would make is no token, and so stays in parts.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(end)
    writer.add_add_bos_token(False)
