"""Measured program: `torch._grouped_mm`, `torch.bmm` and `torch.mm` at the shapes of expert layers.

See `benchmarks/gpu/cases.py` for how it is run. Group sizes are exact here: nothing is padded.
"""

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.cases import Record, attempt, serve_cases
from benchmarks.gpu.shapes import ROUTINGS, MatmulShape, group_sizes, projection
from benchmarks.gpu.timing import seconds_of_rounds
from benchmarks.peers.torch_device import normal, relative_error, wait, working_bytes_of
from benchmarks.worker import Task


def start(task: Task):
    """Versions, and what measures a case."""
    torch.manual_seed(0)

    def measure(case: dict[str, Any]) -> Iterator[Record]:
        shape = projection(case, quick=task["quick"])
        wanted = task["programs"]
        if "torch.bmm" in wanted:
            yield from attempt(lambda: batched(shape, task["rounds"]), program="torch.bmm")
        for routing in ROUTINGS if "torch._grouped_mm" in wanted else ():
            of_routing = partial(grouped, shape, routing, task["rounds"])
            yield from attempt(of_routing, program="torch._grouped_mm", routing=routing)
        if "torch.mm" in wanted:
            yield dense(shape.name, shape.rows, shape.inner, shape.outer, task["rounds"])
        if case.get("baseline"):
            side = 256 if task["quick"] else 8192
            yield dense("dense 8192", side, side, side, task["rounds"])

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"versions": {"torch": torch.__version__}, "device": device}, measure


def grouped(shape: MatmulShape, routing: str, rounds: int) -> Iterator[Record]:
    """The product and its gradients through `torch._grouped_mm`.

    The matrices lie as [E, inner, outer] in one and as [E, outer, inner] in the other form; the faster one
    counts.
    """
    sizes = group_sizes(shape.layer, routing)
    ends = torch.as_tensor(sizes, device=normal(1).device).cumsum(0, dtype=torch.int32)
    rows, cotangent = normal(shape.rows, shape.inner), normal(shape.rows, shape.outer)
    w = normal(shape.experts, shape.inner, shape.outer) * shape.inner**-0.5
    w_turned = w.transpose(1, 2).contiguous()
    passes = {
        "forward": (
            lambda: torch._grouped_mm(rows, w, offs=ends),
            lambda: torch._grouped_mm(rows, w_turned.transpose(1, 2), offs=ends),
        ),
        "data gradient": (
            lambda: torch._grouped_mm(cotangent, w.transpose(1, 2), offs=ends),
            lambda: torch._grouped_mm(cotangent, w_turned, offs=ends),
        ),
        "weight gradient": (lambda: torch._grouped_mm(rows.T, cotangent, offs=ends),),
    }
    arguments = _argument_bytes(rows, w, cotangent)
    expert = int(sizes.argmax())
    mine = slice(int(sizes[:expert].sum()), int(sizes[: expert + 1].sum()))
    x, y_bar, matrix = rows[mine].float(), cotangent[mine].float(), w[expert].float()
    exact = {"forward": x @ matrix, "data gradient": y_bar @ matrix.T, "weight gradient": x.T @ y_bar}
    for name, forms in passes.items():
        out = forms[0]()
        found = out[expert] if name == "weight gradient" else out[mine]
        error = relative_error(found, exact[name])
        del out, found
        yield {
            "program": "torch._grouped_mm",
            "routing": routing,
            "pass": name,
            "flops": shape.flops(),
            "seconds": min((seconds_of_rounds(form, wait, rounds) for form in forms), key=median),
            "argument_bytes": arguments[name],
            "working_bytes": working_bytes_of(forms[0]),
            "error": error,
        }


def batched(shape: MatmulShape, rounds: int) -> Iterator[Record]:
    """The same products with equal groups, through `torch.bmm`."""
    count = shape.rows // shape.experts
    rows, cotangent = normal(shape.experts, count, shape.inner), normal(shape.experts, count, shape.outer)
    w = normal(shape.experts, shape.inner, shape.outer) * shape.inner**-0.5
    arguments = _argument_bytes(rows, w, cotangent)
    passes = {
        "forward": lambda: torch.bmm(rows, w),
        "data gradient": lambda: torch.bmm(cotangent, w.transpose(1, 2)),
        "weight gradient": lambda: torch.bmm(rows.transpose(1, 2), cotangent),
    }
    for name, call in passes.items():
        yield {
            "program": "torch.bmm",
            "routing": "uniform",
            "pass": name,
            "flops": shape.flops(),
            "seconds": seconds_of_rounds(call, wait, rounds),
            "argument_bytes": arguments[name],
            "working_bytes": working_bytes_of(call),
        }


def dense(name: str, rows: int, inner: int, outer: int, rounds: int) -> Record:
    """[rows, inner] x [inner, outer] through `torch.mm`."""
    x, w = normal(rows, inner), normal(inner, outer) * inner**-0.5
    return {
        "case": name,
        "program": "torch.mm",
        "routing": "dense",
        "pass": "forward",
        "flops": 2 * rows * inner * outer,
        "seconds": seconds_of_rounds(lambda: torch.mm(x, w), wait, rounds),
    }


def _argument_bytes(rows: torch.Tensor, w: torch.Tensor, cotangent: torch.Tensor) -> dict[str, int]:
    """Of each pass."""
    return {
        "forward": rows.nbytes + w.nbytes,
        "data gradient": cotangent.nbytes + w.nbytes,
        "weight gradient": rows.nbytes + cotangent.nbytes,
    }


if __name__ == "__main__":
    serve_cases(start)
