"""Which key of config.json says what about our model: both ways.

An architecture is a list of these. Each writes keys of theirs from a model of ours, and reads fields of ours
from keys of theirs; what a config of theirs says beyond our model is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from moe.balance import LossFreeBias
from moe.errors import UserError
from moe.nn import TransformerConfig
from moe.routing import TopK
from moe.routing.group_limited import GroupLimitedTopK

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
class HeadWidth:
    """`head_dim`, which is D / heads where it is not there."""

    written: bool = True
    """False where the architecture has no such key."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        return {"head_dim": model.attention.head_width} if self.written else {}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        head_width = config["hidden_size"] // config["num_attention_heads"]
        return {"attention.head_width": (self.written and config.get("head_dim")) or head_width}


@dataclass(frozen=True)
class HeadNorm:
    """`use_qk_norm`: a norm on each head's queries and keys."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        return {"use_qk_norm": model.attention.qk_norm == "head"}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        return {"attention.qk_norm": "head" if config.get("use_qk_norm") else "none"}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base, and which part of a head is rotated."""

    theta: float = 10_000.0
    """The base where no key says it."""

    fraction: float | None = None
    """The part of a head where no key says it; None where the architecture always rotates all of it."""

    def write(self, model: TransformerConfig) -> Theirs:
        """Under `rope_parameters`, and where older clients look for it."""
        theta, part = model.attention.rope_theta, {}
        if self.fraction is not None:
            part = {"partial_rotary_factor": model.attention.rotary_fraction}
        parameters = {"rope_type": "default", "rope_theta": theta} | part
        return {"rope_parameters": parameters, "rope_theta": theta} | part

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise refuse("rope_type", kind, "only rotary positions without scaling")
        theta = parameters.get("rope_theta", config.get("rope_theta", self.theta))
        part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", self.fraction))
        if self.fraction is None and part not in (None, 1.0):
            raise refuse("partial_rotary_factor", part, "only 1.0 in this architecture")
        return {"attention.rope_theta": float(theta), "attention.rotary_fraction": float(part or 1.0)}


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


@dataclass(frozen=True)
class BiasedSigmoid:
    """Sigmoid scores, a bias in the choice, groups of experts (DeepSeek-V3 2412.19437)."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        routing = model.moe.routing
        groups, kept = 1, 1
        if isinstance(routing, GroupLimitedTopK):
            groups, kept = routing.num_groups, routing.kept_groups
        # The last two are what vLLM asks for.
        return {"n_group": groups, "topk_group": kept, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            Always(key, value).read(config)
        fields = {"moe.routing.scores": "sigmoid", "moe.balance": (LossFreeBias(),), "moe.routing": TopK}
        groups, kept = config.get("n_group") or 1, config.get("topk_group") or 1
        if groups > 1:
            fields["moe.routing"] = GroupLimitedTopK
            fields |= {"moe.routing.num_groups": groups, "moe.routing.kept_groups": kept}
        return fields


@dataclass(frozen=True)
class SharedCount:
    """Shared experts as wide as the routed ones, by their number."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`; one where there are none, see `Architecture`."""
        moe = model.moe
        width = moe.width_classes[0][1]
        return {"n_shared_experts": max(1, moe.shared_hidden // width)}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        width = config["moe_intermediate_size"]
        return {"moe.shared_experts": 1, "moe.shared_width": width * (config.get("n_shared_experts") or 1)}


@dataclass(frozen=True)
class SharedWidth:
    """One shared expert behind a sigmoid gate, by its width (Qwen2-MoE)."""

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`; as wide as the routed experts where there is none, see `Architecture`."""
        moe = model.moe
        return {"shared_expert_intermediate_size": moe.shared_hidden or moe.width_classes[0][1]}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        width = config["shared_expert_intermediate_size"]
        return {"moe.shared_experts": 1, "moe.shared_width": width, "moe.shared_gate": "sigmoid"}


BODY = (
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "width"),
    Key("num_attention_heads", "attention.heads"),
    Key("num_key_value_heads", "attention.kv_heads"),
    Key("rms_norm_eps", "norm_epsilon", 1e-6),
    Key("tie_word_embeddings", "tied_embedding", False),
    Always("hidden_act", "silu"),
)
