"""A run as a Hugging Face checkpoint: config.json, safetensors, tokenizer, generation config, model card."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from moe.export.architecture import Architecture
from moe.export.assemble import ReadWeights
from moe.export.safetensors_file import DTYPES, Entry, SafetensorsWriter
from moe.export.tensors import slots
from moe.nn import TransformerConfig

Precision = Literal["float32", "bfloat16", "float16"]
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Text:
    """How the model was fed."""

    tokenizer: Path
    """Its tokenizer.json."""

    end_of_text: str
    """The token between documents, which each of them began with in training too."""

    sequence_length: int
    """Tokens of a sequence."""


def write_checkpoint(
    folder: Path,
    architecture: Architecture,
    model: TransformerConfig,
    read: ReadWeights,
    text: Text,
    *,
    precision: Precision,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write all that transformers and the engines load; no more than a layer's largest matrix is in memory.

    Args:
        folder: where to, empty.
        architecture: one that carries the model.
        model: of the run.
        read: its weights.
        text: how it was fed.
        precision: of the weights.
        shard_bytes: most bytes of one safetensors file.
    """
    config = architecture.config(model)
    write_weights(folder, architecture, model, read, precision=precision, shard_bytes=shard_bytes)
    ids = _write_tokenizer(folder, text)
    lengths = {"max_position_embeddings": text.sequence_length}
    _write_json(folder / "config.json", config | lengths | ids | {"dtype": precision, "use_cache": True})
    _write_json(folder / "generation_config.json", ids | {"do_sample": True})


def write_weights(
    folder: Path,
    architecture: Architecture,
    model: TransformerConfig,
    read: ReadWeights,
    *,
    precision: Precision,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the safetensors files; see `write_checkpoint`."""
    whole = architecture.whole(architecture.config(model))
    carried = slots(architecture.tensors, whole)
    entries = [
        Entry(name, DTYPES["F32" if slot.tensor.float32 else CODES[precision]], slot.their_shape)
        for slot in carried
        for name in slot.names
    ]
    with SafetensorsWriter(folder, entries, shard_bytes) as writer:
        for slot in carried:
            array = read(slot.leaf, slot.repetition)
            if array is None:  # a part that this architecture always has and our model has not
                array = np.broadcast_to(np.float32(0), slot.shape)
            for tensor in slot.to_theirs(array):
                writer.write([tensor])


def _write_tokenizer(folder: Path, text: Text) -> dict[str, int]:
    """The tokenizer's files; the ids of its special tokens."""
    shutil.copyfile(text.tokenizer, folder / "tokenizer.json")
    special = {f"{role}_token": text.end_of_text for role in ("bos", "eos", "pad")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text.sequence_length}
    _write_json(folder / "tokenizer_config.json", config | special | {"clean_up_tokenization_spaces": False})
    end = tokenizers.Tokenizer.from_file(str(text.tokenizer)).token_to_id(text.end_of_text)
    assert end is not None, "training asked for this token"
    return {f"{role}_id": end for role in special}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
