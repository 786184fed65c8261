"""What each operation of a compiled program costs: FLOPs of products, HBM bytes, the compiler's cycles."""

import math
from dataclasses import dataclass

import numpy as np

from tpu.collectives import Collective, Mesh, collective
from tpu.hlo import FAST, Computation, Instruction, Module, Shape

# Free: names for what is there already, and ends of what was begun elsewhere.
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
SLICES = ("dynamic-slice", "slice", "gather")  # read no more of their first operand than they return
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place; which operand holds what is put there

# Products of splash attention's kernels for each pair of blocks: scores and output; scores, two gradients of
# the scores' inputs and two of the values' side; scores again and the queries' gradient.
ATTENTION_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


@dataclass(frozen=True)
class Operation:
    """One instruction that takes time, and what one run of it costs a device."""

    name: str
    kind: str
    """matrix, experts (grouped products), attention, collective or other."""

    times: int
    """Runs in one step."""

    flops: float
    """Of matrix products; a grouped product counts the rows of balanced experts, not those of its buffer."""

    bytes: float
    """Read from and written to HBM."""

    cycles: int
    """The compiler's estimate, 0 where it has none."""

    source: str
    """Where in the program it comes from."""

    opcode: str

    operands: tuple[str, ...]

    collective: Collective | None = None


@dataclass(frozen=True)
class EvenLoads:
    """What grouped products do on one device when every expert is as likely.

    How much they do shows only while running; their buffer may be larger, to lose no token.
    """

    rows: float
    """That they multiply, with the padding of tiles."""

    touched: float = 1.0
    """Part of the experts here that have rows: XLA's kernel goes from one to the next, past all others."""


def operations(module: Module, mesh: Mesh, even: EvenLoads) -> list[Operation]:
    """All operations of a program, in the order in which they run.

    Args:
        module: compiled for TPU.
        mesh: its axes.
        even: what its grouped products do.
    """
    found = []
    for where, instruction, times in module.executed():
        if instruction.opcode in FREE:
            continue
        sent = collective(module, where, instruction, mesh)
        kind, flops = _products(module, where, instruction, even.rows)
        moved = _bytes(module, where, instruction)
        if sent:
            moved = float(sent.touched)
        elif kind == "experts":
            moved = _grouped_bytes(where, instruction, even)
        found.append(
            Operation(
                instruction.name,
                "collective" if sent else kind,
                times,
                flops,
                moved,
                instruction.cycles,
                instruction.source,
                instruction.opcode,
                instruction.operands,
                sent,
            )
        )
    return found


def _products(module: Module, where: Computation, instruction: Instruction, rows: float) -> tuple[str, float]:
    """Kind of an operation and FLOPs of its matrix products."""
    if instruction.opcode == "custom-call":
        name = instruction.name
        if name.startswith("ragged-dot") and not name.startswith("ragged-dot-metadata"):
            return "experts", _grouped_flops(where, instruction, rows)
        for kernel, products in ATTENTION_PRODUCTS.items():
            if name.startswith(kernel):
                return "attention", products * _pairs_flops(where, instruction)
        return "other", 0.0
    flops = _flops(where, instruction)
    for name in instruction.called if instruction.opcode in ("fusion", "async-start") else ():
        inner = module.computations[name]
        flops += sum(_products(module, inner, i, rows)[1] for i in inner.instructions.values())
    return ("matrix" if flops else "other"), flops


def _flops(where: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        left = where.operand_shapes(instruction)[0]
        contracted = _numbers(instruction, "lhs_contracting_dims")
        return 2.0 * instruction.shapes[0].size * float(np.prod([left.dims[d] for d in contracted]))
    if instruction.opcode == "reduce" and instruction.source.endswith("/dot_general"):
        return 2.0 * where.operand_shapes(instruction)[0].size  # a product too thin for the matrix units
    if instruction.opcode == "convolution":
        return _convolution_flops(where, instruction)
    return 0.0


def _convolution_flops(where: Computation, instruction: Instruction) -> float:
    """TPUs know no other product: batches are dimensions of a window, dilated so that they do not meet.

    Counted are the pairs of input and kernel elements that do meet, as XLA counts them.
    """
    left, kernel = where.operand_shapes(instruction)[:2]
    labels = instruction.attribute("dim_labels") or ""
    inputs, rest = labels.split("_")
    kernels, outputs = rest.split("->")
    window = (instruction.attribute("window") or "{}").strip("{}").split(" ")
    fields = dict(field.split("=") for field in window if field)
    out = instruction.shapes[0]
    met = 1
    for number in sorted(label for label in outputs if label.isdigit()):
        i = int(number)

        def of(field: str, default: str, i=i) -> str:
            return fields[field].split("x")[i] if field in fields else default

        low = int(of("pad", "0_0").split("_")[0])
        size, taps = left.dims[inputs.index(number)], kernel.dims[kernels.index(number)]
        dilation, step, spread = (int(of(f, "1")) for f in ("lhs_dilate", "stride", "rhs_dilate"))
        place = np.arange(out.dims[outputs.index(number)])[:, None] * step + np.arange(taps) * spread - low
        met *= int(((place >= 0) & (place % dilation == 0) & (place < (size - 1) * dilation + 1)).sum())
    batch, features = out.dims[outputs.index("b")], out.dims[outputs.index("f")]
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * met * batch * features * kernel.dims[kernels.index("i")] / groups


def _grouped_flops(where: Computation, instruction: Instruction, balanced: float) -> float:
    """rows [R, D] by matrices [E, D, F], or rows [R, D] by rows [R, F]."""
    rows, other = [s for s in where.operand_shapes(instruction) if len(s.dims) > 1][-2:]
    return 2.0 * min(balanced, rows.dims[0]) * rows.dims[1] * other.dims[-1]


def _pairs_flops(where: Computation, instruction: Instruction) -> float:
    """One product of a causal attention kernel: all pairs of blocks but those wholly ahead."""
    shapes = where.operand_shapes(instruction)
    mask = next(s for s in shapes if s.dtype == "s8")  # one element for each pair of blocks
    # The queries come first; a batch of one is no dimension.
    *batch, heads, sequence, width = next(s for s in shapes if s.dtype == "bf16").dims
    *_, queries, keys = mask.dims
    block_q, block_k = sequence // queries, sequence // keys
    seen = np.arange(keys) * block_k < (np.arange(queries)[:, None] + 1) * block_q
    return 2.0 * math.prod(batch) * heads * width * int(seen.sum()) * block_q * block_k


def _bytes(module: Module, where: Computation, instruction: Instruction) -> float:
    """Read and written in HBM: a slice or a gather counts what it takes, an update what it puts."""
    opcode = instruction.opcode
    if opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [where.instructions[name] for name in instruction.operands]
    if opcode.endswith(
        "-start"
    ):  # a copy between memories of a whole or a part: (one end, other end, context)
        ends = [s for s in instruction.shapes if s.dims][:2]
        return float(min((s.bytes for s in ends), default=0) * sum(s.space != FAST for s in ends))
    if opcode == "fusion":
        return float(_fusion_bytes(module.computations[instruction.called[0]], instruction, operands))
    written = sum(_hbm(s) for s in instruction.shapes)
    if opcode in SLICES:
        return 2.0 * written
    if opcode in UPDATES:
        return 2.0 * sum(_hbm(s) for s in operands[UPDATES[opcode]].shapes)
    return float(written + sum(_hbm(s) for operand in operands for s in operand.shapes))


def _fusion_bytes(inner: Computation, instruction: Instruction, operands: list[Instruction]) -> int:
    total, in_place = 0, set()
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    for root, shape in zip(roots, instruction.shapes, strict=False):
        while root.opcode in ("bitcast", "copy") and root.operands:
            root = inner.instructions[root.operands[0]]
        if root.opcode in UPDATES and shape.space != FAST:
            in_place.add(_origin(inner, root.operands[0]))
            total += inner.instructions[root.operands[UPDATES[root.opcode]]].shapes[0].bytes
        else:
            total += _hbm(shape)
    for number, operand in enumerate(operands):
        if number not in inner.parameters:
            continue
        name, shape = inner.parameters[number].name, operand.shapes[0]
        if name in in_place:
            continue
        users = inner.users(name)
        takes_parts = users and all(u.opcode in SLICES and u.operands[0] == name for u in users)
        if takes_parts and shape.space != FAST:
            total += min(_hbm(shape), sum(u.shapes[0].bytes for u in users))
        else:
            total += _hbm(shape)
    return total


def _origin(inner: Computation, name: str) -> str:
    """The parameter behind bitcasts."""
    while inner.instructions[name].opcode == "bitcast":
        name = inner.instructions[name].operands[0]
    return name


def _grouped_bytes(where: Computation, instruction: Instruction, even: EvenLoads) -> float:
    """Of a grouped product, whose buffer [R, ...] is touched only where there are rows.

    So are the experts' matrices [E, ...] that it reads; one that writes them writes all.
    """
    operands = where.operand_shapes(instruction)
    buffer = max(s.dims[0] for s in operands if len(s.dims) == 2)
    used = min(1.0, even.rows / buffer)

    def rows_or_all(s: Shape) -> float:
        return _hbm(s) * (used if len(s.dims) == 2 and s.dims[0] == buffer else 1.0)

    read = sum(_hbm(s) * even.touched if len(s.dims) == 3 else rows_or_all(s) for s in operands)
    return read + sum(rows_or_all(s) for s in instruction.shapes)


def _hbm(shape: Shape) -> int:
    return 0 if shape.space == FAST else shape.bytes


def _numbers(instruction: Instruction, name: str) -> list[int]:
    text = (instruction.attribute(name) or "{}").strip("{}")
    return [int(n) for n in text.split(",") if n]
