"""Whether a model and its batches can be laid out over a mesh."""

from math import prod

from moe.errors import UserError
from moe.mesh import RULES, MeshConfig
from moe.nn.latent_attention import LatentAttentionConfig
from moe.nn.transformer import TransformerConfig


def check_layout(
    model: TransformerConfig,
    mesh: MeshConfig,
    count: int,
    *,
    sequences: int,
    length: int,
    loss_chunks: int = 1,
) -> None:
    """Refuse a mesh that cannot hold the model, or cannot share its tokens.

    Args:
        model: what is laid out.
        mesh: over which devices.
        count: devices in it.
        sequences: taken at once, over all devices.
        length: tokens of a sequence.
        loss_chunks: parts in which a device makes the logits of its tokens.

    Raises:
        UserError: one line naming the field.
    """
    sizes = mesh.sizes(count)

    def split(logical: str) -> tuple[int, str]:
        """Devices that share a logical axis, and the fields that say so."""
        entry = RULES[logical]
        names = (entry,) if isinstance(entry, str) else entry or ()
        names = [name for name in names if sizes[name] > 1]
        return prod(sizes[name] for name in names), " x ".join(f"mesh.{name}={sizes[name]}" for name in names)

    def shared(what: str, size: int, logical: str) -> None:
        devices, fields = split(logical)
        if size % devices:
            raise UserError(
                f"{what}={size} is stored in parts on {devices} devices ({fields}); make it a multiple"
            )

    attention, moe = model.attention, model.moe
    shared("model.width", model.width, "embed")
    shared("model.vocab_size", model.vocab_size, "vocab")
    shared("model.attention.kv_heads", attention.kv_heads, "attended_heads")
    if isinstance(attention, LatentAttentionConfig):
        shared("model.attention.query_rank", attention.query_rank, "embed")
        shared("model.attention.kv_rank", attention.kv_rank, "embed")
    shared("data.sequence_length", length, "loss_sequence")
    devices, fields = split("loss_sequence")
    if length // devices % loss_chunks:
        raise UserError(
            f"train.loss_chunks={loss_chunks} does not divide the {length // devices} tokens of a sequence "
            f"that a device has in the loss ({fields})"
        )
    if "D" in model.layers.upper():
        shared("model.dense_width", model.dense_width, "mlp")
    if model.layers != model.layers.upper() and sizes["sequence"] > 1:
        raise UserError(
            f"model.layers={model.layers!r} has lower-case layers, which choose among whole sequences; set "
            "mesh.sequence=1"
        )
    if not model.moe_layers:
        return
    for number, width in moe.width_classes:
        if number % sizes["expert"]:
            one = isinstance(moe.expert_width, int)
            what = f"num_experts={number}" if one else f"expert_width: {number} experts are {width} wide"
            raise UserError(f"mesh.expert={sizes['expert']} does not divide model.moe.{what}")
        shared("model.moe.expert_width", width, "mlp")
    shared("model.moe.latent_width", moe.latent_width, "expert_embed")
    if moe.shared_experts:
        shared("model.moe.shared_experts x shared_width", moe.shared_hidden, "mlp")
    if "m" in model.layers:
        moe.group_shape(sequences, model.depth_tokens(length))
    groups, tokens = moe.group_shape(sequences, length)
    part = length // sizes["sequence"]
    if part % tokens and part < length:
        raise UserError(
            f"model.moe.tokens_per_group={moe.tokens_per_group} makes groups of {tokens} tokens, but "
            f"mesh.sequence={sizes['sequence']} leaves a device {part} of each sequence; choose a divisor"
        )
    devices, _ = split("group")
    if groups % devices:
        raise UserError(
            f"model.moe.tokens_per_group={moe.tokens_per_group} leaves {groups} groups for "
            f"{devices} devices; make it smaller"
        )
