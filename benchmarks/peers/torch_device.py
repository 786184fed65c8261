"""What the torch programs share: random data, waiting, memory and errors on the device at hand."""

from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int) -> torch.Tensor:
    """Standard normal numbers in bfloat16."""
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def wait(_: object) -> None:
    """Return when all enqueued work is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def working_bytes_of(call: Callable[[], object]) -> int | None:
    """Most bytes of device memory beyond what is held before, results included; None on a CPU."""
    if DEVICE != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def held_bytes() -> int:
    """Bytes of device memory that tensors hold; zero on a CPU."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|."""
    return ((found.float() - exact).norm() / exact.norm()).item()
