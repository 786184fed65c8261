"""What the programs that measure a peer's MoE layer share: a torch layer, timed and compared with float32.

Timed is what `benchmarks/gpu/moe_layer_jax.py` times of ours: router, top-k softmax with weights that sum to
one, dispatch, SwiGLU experts, combine; with backward the gradients of the tokens and of all parameters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.cases import Record
from benchmarks.gpu.shapes import ROUTINGS, LayerShape, router_bias
from benchmarks.gpu.timing import seconds_of_rounds
from benchmarks.peers.torch_device import DEVICE, held_bytes, normal, relative_error, wait, working_bytes_of

CHECKED_TOKENS = 1024  # through every expert, in the errors of the output and of the tokens' gradient


@dataclass(frozen=True)
class TorchLayer:
    """A peer's layer, and where its numbers lie."""

    infer: Callable[[Tensor], Tensor]
    """Tokens [T, D] to outputs, called without gradients."""

    train: Callable[[Tensor], Tensor]
    """The same as a train step calls it."""

    chosen: Callable[[Tensor], Tensor]
    """The experts that it chooses for tokens, [T, K]. Near ties fall otherwise in float32."""

    router: Tensor
    """[E, D]."""

    inward: Tensor
    """[E, 2 F, D]."""

    outward: Tensor
    """[E, D, F]."""

    gate: slice
    """Rows of `inward` that are the gate's."""

    up: slice
    """Rows of `inward` that are multiplied by the gate."""

    @torch.no_grad()
    def draw(self) -> None:
        """Fresh parameters of the sizes that keep activations near one."""
        for w in (self.router, self.inward, self.outward):
            w.normal_(std=w.shape[-1] ** -0.5)


def measure_layer(layer: TorchLayer, shape: LayerShape, rounds: int) -> Iterator[Record]:
    """Both passes under every routing."""
    layer.draw()
    x, y_bar = normal(shape.tokens, shape.width), normal(shape.tokens, shape.width)
    x[:, 0] = 1  # so that the router's first column is a bias
    x.requires_grad_()
    parameters = (layer.router, layer.inward, layer.outward)
    arguments = sum(a.nbytes for a in (*parameters, x))

    def forward():
        with torch.no_grad():
            return layer.infer(x)

    def both():
        return torch.autograd.grad(layer.train(x), (x, *parameters), y_bar)

    for routing in ROUTINGS:
        with torch.no_grad():
            layer.router[:, 0] = torch.as_tensor(router_bias(shape, routing), device=DEVICE)
        for name, call in {"forward": forward, "forward + backward": both}.items():
            backward = name != "forward"
            record = {
                "routing": routing,
                "pass": name,
                "flops": shape.flops(backward=backward),
                "seconds": seconds_of_rounds(call, wait, rounds),
                "argument_bytes": arguments + backward * y_bar.nbytes,
                "working_bytes": working_bytes_of(call),
            }
            if backward:
                record["saved_bytes"] = saved_bytes(layer, x)
                record["error"] = errors(layer, x, y_bar, forward(), *both())
            yield record


def saved_bytes(layer: TorchLayer, x: Tensor) -> int | None:
    """What a forward pass keeps for the backward pass; None on a CPU."""
    before = held_bytes()
    y = layer.train(x)
    return held_bytes() - before - y.nbytes if DEVICE == "cuda" else None


def errors(
    layer: TorchLayer, x: Tensor, y_bar: Tensor, y: Tensor, x_bar: Tensor, _: Tensor, inward_bar, outward_bar
) -> dict[str, float]:
    """|result - float32 result| / |float32 result|, as `benchmarks/gpu/layer_error.py` has it for ours.

    The float32 result takes the same experts as the layer did.
    """
    with torch.no_grad():
        chosen = layer.chosen(x)
    some = slice(None, CHECKED_TOKENS)
    tokens = x[some].detach().float().requires_grad_()
    exact = torch.zeros_like(tokens)
    for expert in range(len(layer.router)):
        exact = exact + _weighted(layer, expert, tokens, chosen[some], _matrices(layer, expert))
    exact_bar = torch.autograd.grad(exact, tokens, y_bar[some].float())[0]

    busiest = int(chosen.flatten().bincount().argmax())
    mine = (chosen == busiest).any(1)
    matrices = [w.detach().requires_grad_() for w in _matrices(layer, busiest)]
    part = _weighted(layer, busiest, x[mine].detach().float(), chosen[mine], matrices)
    expected = torch.autograd.grad(part, matrices, y_bar[mine].float())
    found = (inward_bar[busiest, layer.gate], inward_bar[busiest, layer.up], outward_bar[busiest])
    return {
        "y": relative_error(y[some], exact.detach()),
        "x": relative_error(x_bar[some], exact_bar),
        "w": relative_error(_flat(found), _flat(expected)),
    }


def _weighted(layer: TorchLayer, expert: int, x: Tensor, chosen: Tensor, matrices) -> Tensor:
    """What one expert adds to tokens' outputs, in float32."""
    logits = x @ layer.router.detach().float().T
    share = torch.softmax(logits.gather(1, chosen), dim=1)
    gate, up, down = matrices
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    return (share * (chosen == expert)).sum(1, keepdim=True) * (hidden @ down.T)


def _matrices(layer: TorchLayer, expert: int) -> list[Tensor]:
    inward, outward = layer.inward[expert].detach().float(), layer.outward[expert].detach().float()
    return [inward[layer.gate], inward[layer.up], outward]


def _flat(parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
