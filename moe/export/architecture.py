"""An architecture of the Hugging Face hub: what it can carry, read off its declaration."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

from moe.balance import LossFreeBias
from moe.config.fields import check
from moe.dispatch import Dropless
from moe.errors import UserError, one_line
from moe.export.attention_keys import Latents
from moe.export.keys import Key, Ours, Theirs
from moe.export.tensors import Tensor
from moe.nn import AttentionConfig, MoEConfig, TransformerConfig
from moe.routing import TopK

ABSENT = "zero_parts"
"""Key of config.json, our own, for parts of an architecture that our model has not and that are all zeros."""

PARTS: dict[str, Ours] = {
    "shared_experts": {"moe.shared_experts": 0, "moe.shared_width": 0, "moe.shared_gate": "none"},
    "score_bias": {"moe.balance": ()},
}


@contextmanager
def understood() -> Iterator[None]:
    """What goes wrong inside with a config.json is told in one line.

    Raises:
        UserError: something did.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]}; put back what the model came with") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"config.json cannot be understood ({one_line(error)}); put back what the model came with"
        ) from error


class Lens(Protocol):
    """One statement of a declaration (`moe.export.keys`)."""

    def write(self, model: TransformerConfig) -> Theirs:
        """Keys of theirs."""
        ...

    def read(self, config: Theirs) -> Ours:
        """Fields of ours."""
        ...


@dataclass(frozen=True)
class LlamaCpp:
    """What llama.cpp's code for an architecture takes for granted."""

    name: str
    """What it calls it."""

    renormalizes: bool | None
    """Whether combine weights are divided by their sum; None where the file says."""

    dense: bool = False
    """Whether it can have dense layers."""

    whole_heads: bool = False
    """Whether all query heads together must be as wide as the model."""

    whole_keys: bool = False
    """Whether all key heads must be, too."""

    own_head: bool = False
    """Whether the output head must be a tensor of its own."""

    interleaved: bool = False
    """Whether rotary positions pair neighbouring dimensions, not the halves of a head."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that are not the usual ones, by ours."""


@dataclass(frozen=True)
class Architecture:
    """How models of one architecture say in config.json and in tensors what ours say.

    Where an architecture always has shared experts or a bias in the choice, a model of ours that has not is
    carried with zeros there, which add nothing; `zero_parts` in its config.json says so.
    """

    model_type: str
    """By which config.json names it."""

    class_name: str
    """The class in transformers."""

    keys: tuple[Lens, ...]
    """What config.json says."""

    tensors: tuple[Tensor, ...]
    """What the weights are called, and how they lie."""

    llama_cpp: LlamaCpp
    """What llama.cpp makes of it."""

    def config(self, model: TransformerConfig) -> dict[str, Any]:
        """The keys of config.json that describe a model."""
        keys = {"architectures": [self.class_name], "model_type": self.model_type}
        for lens in self.keys:
            keys |= lens.write(model)
        whole, absent = self.whole(keys), []
        if whole.moe.shared_experts and not model.moe.shared_experts:
            absent.append("shared_experts")
        if whole.moe.controller and not model.moe.controller:
            absent.append("score_bias")
        return keys | ({ABSENT: absent} if absent and model.moe_layers else {})

    def whole(self, config: Theirs) -> TransformerConfig:
        """Our model of a config.json, parts of zeros included.

        Raises:
            UserError: it lacks a key, or says what our model cannot do.
        """
        found: Ours = {}
        with understood():
            for lens in self.keys:
                found |= lens.read(config)
            for name, value in found.items():
                if isinstance(value, int | float) and value < 0:
                    raise UserError(f"config.json makes {name} {value}; put back what the model came with")
            model = _assemble(found)
            check(model)
        return model

    def model(self, config: Theirs) -> TransformerConfig:
        """Our model of a config.json.

        Raises:
            UserError: it lacks a key, or says what our model cannot do.
        """
        whole, parts = self.whole(config), config.get(ABSENT, [])
        if not isinstance(parts, list) or not all(part in PARTS for part in parts):
            raise UserError(f"config.json: {ABSENT}={parts!r} must be a list of {', '.join(PARTS)}")
        for part in parts:
            without = {name.removeprefix("moe."): value for name, value in PARTS[part].items()}
            whole = replace(whole, moe=replace(whole.moe, **without))
        return whole

    def missing(self, model: TransformerConfig) -> list[str]:
        """Features of a model that the architecture has no words for, such as `model.moe.latent_width=64`."""
        mixture = any(getattr(lens, "ours", "").startswith("moe.") for lens in self.keys)
        if mixture and not model.moe_layers:
            return [f"model.layers={model.layers}"]  # all dense, which engines do not expect of a mixture
        for lens in self.keys:
            if isinstance(lens, Key | Latents) and not lens.write(model):
                return [_feature(model, lens.ours)]
        carried = self.model(self.config(model))
        layers = [] if carried.layers == model.layers else [f"model.layers={model.layers}"]
        return layers + differences("model", essence(model), essence(replace(carried, layers=model.layers)))


def essence(model: TransformerConfig) -> TransformerConfig:
    """The model without what does not change its outputs: how it is computed, balanced and laid out."""
    plain = TransformerConfig()
    moe = MoEConfig()
    if model.moe_layers:
        moe = replace(
            model.moe,
            balance=(LossFreeBias(),) if model.moe.controller else (),
            dispatch=Dropless(),
            tokens_per_group=0,
            shared_experts=min(1, model.moe.shared_experts),
            shared_width=model.moe.shared_hidden,
        )
    return replace(
        model,
        moe=moe,
        dense_width=model.dense_width if "D" in model.layers.upper() else plain.dense_width,
        depth_capacity=model.depth_capacity if model.layers != model.layers.upper() else plain.depth_capacity,
        compute_dtype=plain.compute_dtype,
        remat=plain.remat,
        unroll=plain.unroll,
    )


def choose(architectures: Sequence[Architecture], model: TransformerConfig) -> Architecture:
    """The first architecture that carries the model.

    Raises:
        UserError: none does; the message names the features that the nearest ones lack.
    """
    missing = {architecture.model_type: architecture.missing(model) for architecture in architectures}
    for architecture in architectures:
        if not missing[architecture.model_type]:
            return architecture

    def distance(name: str) -> tuple[bool, int]:
        return any(feature.startswith("model.attention=") for feature in missing[name]), len(missing[name])

    lacking: dict[str, list[str]] = {}
    for name in missing:
        if distance(name) == min(map(distance, missing)):
            lacking.setdefault(" and no ".join(missing[name]), []).append(name)
    nearest = "; ".join(
        f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} no {features}"
        for features, names in lacking.items()
    )
    raise UserError(f"no architecture carries this model; the nearest: {nearest}")


def _assemble(found: Ours) -> TransformerConfig:
    """A model from its fields by dotted name."""

    def section(prefix: str) -> dict[str, Any]:
        inside = {
            name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)
        }
        return {name: value for name, value in inside.items() if "." not in name and name != "routing"}

    attention = found.get("attention", AttentionConfig)(**section("attention."))
    routing = found.get("moe.routing", TopK)(**section("moe.routing."))
    moe = MoEConfig(**{"balance": (), **section("moe.")}, routing=routing)
    return TransformerConfig(**section("") | {"attention": attention}, moe=moe)


def _feature(model: TransformerConfig, name: str) -> str:
    """A field with its value, or what should hold it and has no such field."""
    path, config = "model", model
    for part in name.split("."):
        if not hasattr(config, part):
            break
        path, config = f"{path}.{part}", getattr(config, part)
    return f"{path}={config}"


def differences(name: str, ours: Any, carried: Any) -> list[str]:
    """Fields of two configs that differ, each with the value of the first, such as `model.width=64`."""
    if ours == carried:
        return []
    if type(ours) is not type(carried) or not is_dataclass(ours):
        return [f"{name}={ours}"]
    return [
        line
        for part in fields(ours)
        for line in differences(f"{name}.{part.name}", getattr(ours, part.name), getattr(carried, part.name))
    ]
