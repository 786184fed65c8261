"""Which keys of config.json describe routing and shared experts; see `moe.export.keys`."""

from dataclasses import dataclass

from moe.balance import LossFreeBias
from moe.export.keys import Always, DenseFirst, Key, Ours, Theirs
from moe.nn import TransformerConfig
from moe.routing import TopK
from moe.routing.group_limited import GroupLimitedTopK


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


def sigmoid_mixture(scale: float) -> tuple[Key | DenseFirst | BiasedSigmoid | SharedCount, ...]:
    """Dense layers first, then mixtures with sigmoid scores.

    Args:
        scale: of the routed experts, where config.json gives none.
    """
    return (
        DenseFirst(),
        Key("intermediate_size", "dense_width"),
        Key("n_routed_experts num_local_experts", "moe.num_experts"),
        Key("moe_intermediate_size", "moe.expert_width"),
        Key("num_experts_per_tok", "moe.routing.k"),
        Key("norm_topk_prob", "moe.routing.renormalize", True),
        Key("routed_scaling_factor", "moe.routing.scale", scale),
        BiasedSigmoid(),
        SharedCount(),
    )
