"""The model of `serving_cpu.py`: 275M parameters, 48M active, random weights that any program makes again."""

import zlib
from pathlib import Path

import numpy as np

from moe.data import Bytes
from moe.export.architecture import choose
from moe.export.architectures import ARCHITECTURES
from moe.export.gguf_file import write_gguf
from moe.export.hugging_face import Text, write_checkpoint
from moe.export.onnx_folder import write_onnx
from moe.export.stored import StoredWeights
from moe.export.tensors import leaves
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig
from moe.quant import format_named
from moe.routing import TopK

LENGTH = 512  # tokens that a cache holds
TOKENIZER, END = "tokenizer.json", "<|endoftext|>"
# Under these, greedy tokens differ from one another. Attention that looks at all tokens alike would hide
# which one came last, and a larger embedding would make it the likeliest next one: then the same experts,
# which caches hold by then, would serve every token.
EMBEDDING, HEAD_NORM = 0.05, 3.0

MODEL = TransformerConfig(
    vocab_size=32_768,
    width=512,
    layers=8 * "M",
    attention=AttentionConfig(heads=8, kv_heads=4, head_width=64, qk_norm="head"),
    moe=MoEConfig(num_experts=40, expert_width=512, routing=TopK(k=4), balance=()),
    tied_embedding=True,
)


class Weights:
    """Matrices drawn as for training, a layer at a time (`moe.export.assemble.ReadWeights`)."""

    def __init__(self):
        self._leaves = leaves(MODEL)

    def read(self, leaf: str, place: int | None) -> np.ndarray | None:
        """One layer's part of a parameter."""
        if leaf not in self._leaves:
            return None
        shape = self._leaves[leaf].shape[place is not None :]
        if leaf.endswith("scale"):
            return np.full(shape, HEAD_NORM if "attention/" in leaf else 1.0, np.float32)
        deviation = EMBEDDING if leaf == "embedding" else shape[-2] ** -0.5
        random = np.random.default_rng(zlib.crc32(f"{leaf}/{place}".encode()))
        return deviation * random.standard_normal(shape, np.float32)


def write(folder: Path, kind: str, precision: str) -> Path:
    """An export of the model; its file or folder.

    Args:
        folder: for all exports.
        kind: as `export.py --to` has it.
        precision: as `export.py --precision` or `--quantize` has it.
    """
    tokenizer, out = folder / TOKENIZER, folder / f"{kind}-{precision}"
    if not tokenizer.exists():
        Bytes().build([]).save(str(tokenizer))
    text, read = Text(tokenizer, END, LENGTH), Weights().read
    architecture = choose(ARCHITECTURES, MODEL)
    if kind == "gguf":
        write_gguf(out, architecture, MODEL, read, text, name="serving", precision=precision)
        return out
    out.mkdir()
    if kind == "onnx":
        format = None if precision == "float32" else format_named(precision)
        write_onnx(out, MODEL, read, text, name="serving", format=format)
    else:
        write_checkpoint(out, StoredWeights(architecture, MODEL, read, precision), text)
    return out
