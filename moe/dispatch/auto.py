"""The exchange that fits the devices at hand."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from moe.dispatch.all_to_all import AllToAll
from moe.dispatch.exchange import Exchange, ExpertWeights, Returned, Work
from moe.dispatch.gather import Gather
from moe.dispatch.ragged_all_to_all import RaggedAllToAll, sends_exact_counts
from moe.dispatch.rounds import Buffers
from moe.kernels.device import present_device
from moe.mesh import axis_size
from moe.routing.assignment import Routing

WORTH = 0.9  # of what a gather sends: for more than that, packing is not worth its time


@dataclass(frozen=True)
class Auto(Exchange):
    """`Gather` where nearly every token has an expert on every device, else an all-to-all.

    Under even use a token with k experts has some on 1 - (1 - 1/n)^k of n devices. `AllToAll` sends its
    buffers, which are larger than that by their room; TPUs but v5e send exact counts (`RaggedAllToAll`),
    which between GPUs makes 3 GB/s; `Gather` sends everything, and packs nothing. Between two H200s
    all-to-all makes 219 GB/s and all-gather 203, much the same (jax 0.11.2, 2026-11), so bytes decide.
    """

    def __call__(
        self, work: Work, x: Float[Array, "groups T D"], routing: Routing, weights: ExpertWeights
    ) -> Returned:
        """See `Exchange`."""
        k = -(-routing.expert.shape[1] // x.shape[1])
        exchange = self.choose(axis_size("expert"), k, present_device(), keep_outputs=work.keep_outputs)
        return exchange(work, x, routing, weights)

    def choose(self, devices: int, k: int, device, *, keep_outputs: bool) -> Exchange:
        """The exchange for that many such devices along `expert`, and k assignments a token."""
        tokens = 2**16
        if sends_exact_counts(device):
            exchange, part = RaggedAllToAll(), 1 - (1 - 1 / devices) ** k
        else:
            exchange = AllToAll()
            part = Buffers.sized(tokens, k, k, devices, 1, exchange.room).places / tokens
        return Gather() if keep_outputs or part > WORTH else exchange
