"""A Hugging Face checkpoint as a model of ours: config, weights, tokenizer, every tensor accounted for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moe.data import TokenizerFile
from moe.errors import UserError, one_line
from moe.export.architecture import Architecture, understood
from moe.export.safetensors_file import SafetensorsFolder
from moe.export.tensors import Part, Slot, slots
from moe.nn import TransformerConfig


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no checkpoint (config.json is missing); give the folder of one")
    return _read_json(path)


def architecture_of(config: dict[str, Any], architectures: Sequence[Architecture]) -> Architecture:
    """The architecture that a config.json names.

    Raises:
        UserError: it is none of these.
    """
    found = {architecture.model_type: architecture for architecture in architectures}
    name = config.get("model_type")
    if not isinstance(name, str) or name not in found:
        raise UserError(
            f"config.json: model_type={name!r} is not supported; supported are {', '.join(found)}"
        )
    if "quantization_config" in config:
        raise UserError(
            "config.json: the weights are quantised; give the checkpoint that they were made from"
        )
    return found[name]


def read_tokenizer(folder: Path, model: TransformerConfig, end_of_text: str) -> TokenizerFile:
    """The tokenizer of a checkpoint.

    Args:
        folder: of the checkpoint.
        model: whose vocabulary it must fit.
        end_of_text: the token between documents; "" takes the end of sequence that the checkpoint names.

    Raises:
        UserError: it is missing, damaged, larger than the vocabulary, or names no end of text.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; save the tokenizer beside the weights (PreTrainedTokenizerFast)")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of a file
        raise UserError(f"{path} is no readable tokenizer ({one_line(error)}); fetch it again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if largest > model.vocab_size:
        raise UserError(
            f"{path} has {largest} tokens and config.json says vocab_size={model.vocab_size}; put back the "
            "tokenizer that the model came with"
        )
    end_of_text = end_of_text or _end_of_text(folder, tokenizer)
    if tokenizer.token_to_id(end_of_text) is None:
        raise UserError(f"--end-of-text {end_of_text!r} is no token of {path}; give one that is")
    return TokenizerFile(str(path), end_of_text=end_of_text)


def _end_of_text(folder: Path, tokenizer: tokenizers.Tokenizer) -> str:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = _read_json(folder / name).get("eos_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            token = tokenizer.id_to_token(first) if isinstance(first, int) else None
            if token is not None:
                return token
    raise UserError(f"{folder} names no end-of-sequence token of its tokenizer; say which with --end-of-text")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; fetch it again")
    return content


@dataclass(frozen=True)
class _Found:
    """Where one parameter of one layer is."""

    slot: Slot
    names: list[str]
    """Of the tensors that hold it."""
    part: Part | None
    """Where one tensor holds all experts."""


class HuggingFaceWeights:
    """The weights of a checkpoint, by our names.

    Opening it compares every tensor with what the architecture says there must be; nothing is read yet.

    Args:
        folder: of the checkpoint.
        architecture: of it.
        config: its config.json.

    Raises:
        UserError: a tensor is missing, of another shape or unknown, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, architecture: Architecture, config: dict[str, Any]):
        self._folder, self._files = folder, SafetensorsFolder(folder)
        whole, model = architecture.whole(config), architecture.model(config)
        with understood():
            known = {slot.leaf for slot in slots(architecture.tensors, model)}
            wanted = slots(architecture.tensors, whole)
        self._found: dict[tuple[str, int | None], _Found] = {}
        self._zeros: list[_Found] = []
        left = self._files.names
        for slot in wanted:
            found = self._find(slot)
            left -= set(found.names)
            if slot.leaf in known:
                self._found[slot.leaf, slot.repetition] = found
            else:
                self._zeros.append(found)
        beyond = f"model.layers.{len(model.layers)}."
        self.left_out = sorted(name for name in left if name.startswith(beyond))
        """Tensors of a layer that only predicts further tokens (multi-token prediction): not part of ours."""
        unknown = sorted(left - set(self.left_out))
        if unknown:
            raise UserError(
                f"{folder} has {len(unknown)} tensors that {architecture.model_type} has not, the first is "
                f"{unknown[0]}; check model_type and num_hidden_layers in config.json"
            )

    def read(self, leaf: str, place: int | None) -> np.ndarray | None:
        """One layer's part of a parameter (`moe.export.assemble.ReadWeights`), float32."""
        found = self._found.get((leaf, place))
        return None if found is None else self._read(found)

    @property
    def places(self) -> list[tuple[str, int | None]]:
        """All that can be read."""
        return list(self._found)

    def check_zeros(self) -> None:
        """Refuse a checkpoint whose absent parts are not zero.

        Raises:
            UserError: one is not.
        """
        for found in self._zeros:
            if self._read(found).any():
                raise UserError(
                    f"{self._folder}: {found.names[0]} is not zero, though config.json lists it as a part of "
                    "zeros; take zero_parts out of config.json"
                )

    def _find(self, slot: Slot) -> _Found:
        tensor, names = slot.tensor, self._files.names
        choices = [_Found(slot, slot.names, None)]
        if tensor.also:
            choices.append(_Found(slot, [slot.prefix + tensor.also], None))
        if tensor.fused:
            choices.append(_Found(slot, [slot.prefix + tensor.fused.theirs], tensor.fused))
        # The first of a choice tells which layout this is.
        found = next((choice for choice in choices if choice.names[0] in names), choices[0])
        for name in found.names:
            if name not in names:
                raise UserError(f"{self._folder} has no tensor {name}; fetch the whole checkpoint")
            wanted = slot.their_shape
            if found.part:
                wanted = (slot.shape[0], found.part.parts * wanted[0], *wanted[1:])
            if self._files.shape(name) != wanted:
                raise UserError(
                    f"{self._folder}: {name} is {list(self._files.shape(name))}, by config.json it should be "
                    f"{list(wanted)}; put back the config.json that it came with"
                )
        return found

    def _read(self, found: _Found) -> np.ndarray:
        layout = found.slot.tensor.layout
        if found.part:
            whole = self._files.read(found.names[0])
            return layout.to_ours(np.split(whole, found.part.parts, axis=1)[found.part.part])
        if "{expert}" in found.slot.tensor.theirs:
            return np.stack([layout.to_ours(self._files.read(name)) for name in found.names])
        return layout.to_ours(self._files.read(found.names[0]))
