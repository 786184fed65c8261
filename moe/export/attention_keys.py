"""Which keys of config.json describe attention; see `moe.export.keys`."""

from dataclasses import dataclass
from typing import ClassVar

from moe.export.keys import Always, Ours, Theirs, refuse
from moe.nn import AttentionConfig, LatentAttentionConfig, TransformerConfig


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
        return {"use_qk_norm": getattr(model.attention, "qk_norm", None) == "head"}

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        return {"attention.qk_norm": "head" if config.get("use_qk_norm") else "none"}


@dataclass(frozen=True)
class Latents:
    """Multi-head latent attention, by the widths of its latents and heads (DeepSeek)."""

    ours: ClassVar[str] = "attention"
    widths: ClassVar[dict[str, str]] = {
        "num_attention_heads": "heads",
        "kv_lora_rank": "kv_rank",
        "qk_nope_head_dim": "plain_width",
        "qk_rope_head_dim": "rotary_width",
        "v_head_dim": "value_width",
    }

    def write(self, model: TransformerConfig) -> Theirs:
        """See `Key`."""
        attention = model.attention
        if not isinstance(attention, LatentAttentionConfig):
            return {}
        keys = {theirs: getattr(attention, ours) for theirs, ours in self.widths.items()}
        return keys | {
            "num_key_value_heads": attention.heads,
            "q_lora_rank": attention.query_rank or None,
            "rope_interleave": True,
        }

    def read(self, config: Theirs) -> Ours:
        """See `Key`."""
        Always("rope_interleave", True).read(config)
        widths = {f"attention.{ours}": config[theirs] for theirs, ours in self.widths.items()}
        rank = {"attention.query_rank": config.get("q_lora_rank") or 0}
        return {"attention": LatentAttentionConfig} | widths | rank


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base, and which part of a head is rotated."""

    theta: float = 10_000.0
    """The base where no key says it."""

    fraction: float | None = None
    """The part of a head where no key says it; None where the architecture always rotates all of it."""

    def write(self, model: TransformerConfig) -> Theirs:
        """Under `rope_parameters`, and where older clients look for it."""
        attention = model.attention
        theta, part = attention.rope_theta, {}
        if self.fraction is not None and isinstance(attention, AttentionConfig):
            part = {"partial_rotary_factor": attention.rotary_fraction}
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
        fraction = {} if self.fraction is None else {"attention.rotary_fraction": part}
        return {"attention.rope_theta": float(theta)} | fraction
