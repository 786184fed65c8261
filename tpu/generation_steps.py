"""The two programs of `generate.py` for a topology, and the FLOPs that they should cost.

Experts are split over `expert`, slots over all devices; everything else is whole on each (`moe.decode`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.analysis.compute import account, by_component
from moe.analysis.cost.touched import touched_evenly
from moe.decode import Decoder, Request, for_decoding
from moe.decode.slots import Programs, Sequences, Slots
from moe.errors import UserError
from moe.experiment import Experiment
from moe.kernels.attention import block_length, splash_cuts
from moe.mesh import BATCH, abstract
from moe.nn import TransformerConfig, build
from moe.training.state import split
from tpu.lowered import Lowered, Serving
from tpu.operations import EvenLoads

SLOTS_PER_DEVICE = 8  # as in generate.py


class _Laid(NamedTuple):
    """A model and its slots, as shapes."""

    model: TransformerConfig
    programs: Programs
    decoder: Decoder
    slots: Slots
    devices: int
    length: int

    @property
    def held(self) -> dict:
        """What stays on the devices, by kind."""
        return {"parameters": jax.tree.leaves(self.decoder), "cache": self.slots.caches}


def check_generation(experiment: Experiment, serving: Serving, count: int) -> None:
    """Refuse what cannot be decoded, or what so many devices cannot share.

    Raises:
        UserError: one line naming the field or option.
    """
    sizes, model = experiment.mesh.sizes(count), for_decoding(experiment.model)
    for name in sizes.keys() - set(BATCH):
        if sizes[name] > 1:
            raise UserError(f"mesh.{name}={sizes[name]}: generation splits slots and experts only; make it 1")
    for number, _ in model.moe.width_classes if model.moe_layers else ():
        if number % sizes["expert"]:
            raise UserError(f"mesh.expert={sizes['expert']} does not divide the {number} experts of a layer")
    if serving.slots % count:
        raise UserError(f"--slots {serving.slots} must be a multiple of the {count} devices")
    length = _slot_length(experiment, serving)
    if serving.prompt > length:
        raise UserError(f"--prompt {serving.prompt} is longer than a slot of {length} tokens (--length)")


def decode(experiment: Experiment, serving: Serving) -> Lowered:
    """One more token of every slot, all of them in use.

    The model's FLOPs are those of a token in the middle of its slot; attention's static shapes always cost
    the whole of it.
    """
    laid = _lay_out(experiment, serving)
    count = len(laid.slots.sequences.token)
    program = laid.programs.step.lower(
        jax.tree.leaves(laid.decoder), laid.slots, jax.ShapeDtypeStruct((count,), jnp.bool), 1
    )
    forward = account(laid.model, laid.length).forward_flops
    unseen = 2 * _half_product(laid.model, laid.length)
    even = _even_loads(laid.model, count // laid.devices)
    return Lowered(program, laid.held, count, forward * count, (forward + unseen) * count, even)


def prefill(experiment: Experiment, serving: Serving) -> Lowered:
    """A prompt read into a slot of every device, which makes its first token."""
    laid = _lay_out(experiment, serving)
    prompt, rows = serving.prompt or laid.length, laid.devices
    sequences = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Sequences.of([Request((0,))] * rows)))
    program = laid.programs.prefill.lower(
        jax.tree.leaves(laid.decoder),
        laid.slots,
        jax.ShapeDtypeStruct((rows, prompt), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        sequences,
    )
    parts = by_component(laid.model, prompt)
    head = parts["embedding" if laid.model.tied_embedding else "head"].forward_flops
    layers = sum(part.forward_flops for part in parts.values()) - head
    model = rows * (prompt * layers + head)  # only a prompt's last position becomes logits
    splash = splash_cuts(prompt, laid.model.attention.head_width)
    ahead = block_length(prompt) / prompt if splash else 1.0  # pairs beyond the half
    beyond = rows * prompt * 2 * _half_product(laid.model, prompt) * ahead
    return Lowered(program, laid.held, rows * prompt, model, model + beyond, _even_loads(laid.model, prompt))


def _lay_out(experiment: Experiment, serving: Serving) -> _Laid:
    """A model and empty slots on the mesh that is set."""
    model, devices = for_decoding(experiment.model), jax.sharding.get_mesh().size
    count = serving.slots or SLOTS_PER_DEVICE * devices
    length = _slot_length(experiment, serving)

    def make() -> Decoder:
        _, params, controllers = split(build(model, jax.random.key(0)))
        return Decoder.of(model, params, controllers)

    decoder = abstract(make)
    slots = abstract(lambda: Slots.empty(decoder, count, length, serving.cache))
    return _Laid(model, Programs.of(decoder, model.vocab_size), decoder, slots, devices, length)


def _slot_length(experiment: Experiment, serving: Serving) -> int:
    return serving.length or experiment.data.sequence_length


def _half_product(model: TransformerConfig, length: int) -> float:
    """FLOPs a token of one product of attention, of half the pairs, in all layers."""
    return len(model.layers) * 2 * model.attention.heads * model.attention.head_width * length / 2


def _even_loads(model: TransformerConfig, tokens: int) -> EvenLoads:
    """What a device's grouped products do if every expert is as likely, of its own number of tokens.

    Tiles are no wider than a row here: of few rows the kernel's time is that of reading matrices.
    """
    moe, split = model.moe, jax.sharding.get_mesh().shape["expert"]
    if not model.moe_layers:
        return EvenLoads(0.0)
    k = moe.experts_per_token(1)
    return EvenLoads(tokens * k, touched_evenly(moe.num_experts, k, tokens * split) / moe.num_experts)
