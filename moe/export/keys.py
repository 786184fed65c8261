"""Which key of config.json says what about our model: both ways.

An architecture is a list of these. Each writes keys of theirs from a model of ours, and reads fields of ours
from keys of theirs; what a config of theirs says beyond our model is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from moe.errors import UserError
from moe.nn import TransformerConfig

Theirs = Mapping[str, Any]
"""Keys of config.json."""

Ours = dict[str, Any]
"""Fields of `TransformerConfig` by dotted name, such as `moe.num_experts`."""

REQUIRED = object()


def refuse(key: str, value: object, wanted: str) -> UserError:
    """What to raise where a config of theirs says what our model cannot do."""
    return UserError(f"config.json: {key}={value!r} is not supported, {wanted}")


@dataclass(frozen=True)
class Key:
    """A key that says what one field says."""

    theirs: str
    """Name of the key; several, parted by spaces, are all written, and the first that is there is read."""

    ours: str
    """Name of the field."""

    default: Any = REQUIRED
    """What it means that the key is not there."""

    def write(self, model: TransformerConfig) -> Theirs:
        """Keys of theirs; none where the model has no such field, or more than one number in it."""
        value = reduce(lambda config, name: getattr(config, name, None), self.ours.split("."), model)
        return {} if value is None or isinstance(value, tuple) else dict.fromkeys(self.theirs.split(), value)

    def read(self, config: Theirs) -> Ours:
        """Fields of ours."""
        for name in self.theirs.split():
            if config.get(name) is not None:
                return {self.ours: config[name]}
        if self.default is REQUIRED:
            raise UserError(f"config.json has no {self.theirs.split()[0]}; put back what the model came with")
        return {self.ours: self.default}


@dataclass(frozen=True)
class Always:
    """A key that has one value in every model of ours."""

    theirs: str
    """Name of the key."""

    value: Any
    """What it must say, and says where it is not there."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        return {self.theirs: self.value}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        found = config.get(self.theirs, self.value)
        if (found or None) != (self.value or None):
            raise refuse(self.theirs, found, f"only {self.value!r}")
        return {}


@dataclass(frozen=True)
class Field:
    """A field that has one value in every model of this architecture."""

    ours: str
    """Name of the field."""

    value: Any
    """What it is."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        return {}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        return {self.ours: self.value}


@dataclass(frozen=True)
class DenseAnywhere:
    """Layers, of which `mlp_only_layers` lists the dense ones (Qwen)."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        dense = [layer for layer, kind in enumerate(model.layers) if kind.upper() == "D"]
        return {"num_hidden_layers": len(model.layers), "mlp_only_layers": dense, "decoder_sparse_step": 1}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
        layers = range(config["num_hidden_layers"])
        kinds = ("D" if layer in dense or (layer + 1) % step else "M" for layer in layers)
        return {"layers": "".join(kinds)}


@dataclass(frozen=True)
class DenseFirst:
    """Layers, of which the first `first_k_dense_replace` are dense (DeepSeek, GLM)."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        first = len(model.layers) - len(model.layers.upper().lstrip("D"))
        return {"num_hidden_layers": len(model.layers), "first_k_dense_replace": first}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        count = config["num_hidden_layers"]
        first = min(config.get("first_k_dense_replace") or 0, count)
        return {"layers": first * "D" + (count - first) * "M"}


@dataclass(frozen=True)
class AllOfOneKind:
    """Layers, all of one kind."""

    kind: str = "M"

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        return {"num_hidden_layers": len(model.layers)}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        return {"layers": config["num_hidden_layers"] * self.kind}


BODY = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "width"),
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    Key("tie_word_embeddings", "tied_embedding", False),
    Always("hidden_act", "silu"),
)

HEADS = (Key("num_attention_heads", "attention.heads"), Key("num_key_value_heads", "attention.kv_heads"))
