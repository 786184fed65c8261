"""A run as a Hugging Face checkpoint: config.json, safetensors, tokenizer, generation config, model card."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from moe.export.safetensors_file import SafetensorsWriter
from moe.export.stored import StoredWeights

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
    folder: Path, stored: StoredWeights, text: Text, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write all that transformers and the engines load; no more than a layer's largest matrix is in memory.

    Args:
        folder: where to, empty.
        stored: the run's weights as they are to lie there.
        text: how it was fed.
        shard_bytes: most bytes of one safetensors file.
    """
    write_weights(folder, stored, shard_bytes)
    ids = write_tokenizer(folder, text)
    lengths = {"max_position_embeddings": text.sequence_length}
    _write_json(folder / "config.json", stored.config | lengths | ids | {"use_cache": True})
    _write_json(folder / "generation_config.json", ids | {"do_sample": True})


def write_weights(folder: Path, stored: StoredWeights, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the safetensors files; see `write_checkpoint`."""
    entries = [entry for slot in stored.slots for entry in stored.entries(slot)]
    with SafetensorsWriter(folder, entries, shard_bytes) as writer:
        for slot in stored.slots:
            for tensor in stored.tensors(slot):
                writer.write([tensor])


def write_tokenizer(folder: Path, text: Text) -> dict[str, int]:
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
