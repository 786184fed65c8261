"""The collectives of a compiled program: which, over which mesh axes, how many bytes."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tpu.hlo import Computation, Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# A collective that v5e's compiler takes in steps beside several products: fusions that begin and end it.
STEPS_BEGIN, STEPS_END = "async-collective-start", "async-collective-done"


@dataclass(frozen=True)
class Mesh:
    """Names and lengths of the mesh axes, major first: partition i of a program is device i in that order."""

    axes: dict[str, int]

    @property
    def ids(self) -> np.ndarray:
        """Partition numbers in the shape of the mesh."""
        return np.arange(int(np.prod(list(self.axes.values())))).reshape(tuple(self.axes.values()))

    def varying(self, group: np.ndarray) -> tuple[str, ...]:
        """The axes along which the members of a group differ."""
        places = np.stack(np.unravel_index(group, self.ids.shape))
        return tuple(name for name, row in zip(self.axes, places, strict=True) if len(set(row)) > 1)


@dataclass(frozen=True)
class Collective:
    """What one instruction sends between devices, once."""

    kind: str
    """One of `KINDS`. A sum of which each device keeps a part is a reduce-scatter, however it is written."""

    axes: tuple[str, ...]
    """The mesh axes it goes along."""

    group: tuple[int, ...]
    """Partitions of its first group."""

    payload: int
    """Bytes of the whole array before a sum or after a gather; of a device's own part otherwise."""

    concurrent: bool
    """Whether the program computes while it is under way."""

    @property
    def touched(self) -> int:
        """Bytes that a device reads and writes of it in HBM."""
        parts = len(self.group) if self.kind in ("all-gather", "reduce-scatter") else 1
        return self.payload + self.payload // parts

    @property
    def sent(self) -> int:
        """Bytes that a device sends when bandwidth is used best (ring algorithms)."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.payload
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.payload * (len(self.group) - 1) // len(self.group)


def collective(module: Module, where: Computation, instruction: Instruction, mesh: Mesh) -> Collective | None:
    """What this instruction sends, None where it only computes (or waits for one that was begun).

    Fusions and asynchronous calls are looked into: XLA's TPU compiler hides reduce-scatters in the former,
    and what a SparseCore sends in the latter.
    """
    inside = next(_sending(module, where, instruction), None)
    if inside is None or continues(instruction) or instruction.name.startswith(STEPS_END):
        return None
    computation, inner = inside
    kind = _kind(inner) or ""
    concurrent = instruction.opcode.endswith("-start") or instruction.name.startswith(STEPS_BEGIN)
    results = inner.shapes[len(inner.shapes) // 2 :] if inner.opcode == "all-gather-start" else inner.shapes
    operands = computation.operand_shapes(inner)
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
        kind = "reduce-scatter"
    if kind == "ragged-all-to-all":  # operands: what is sent, where it goes, and four lists of places
        operands = operands[:1]
    payload = sum(s.bytes for s in (results if kind == "all-gather" else operands))
    group = _first_group(inner, mesh)
    return Collective(kind, mesh.varying(group), tuple(int(i) for i in group), payload, concurrent)


def continues(instruction: Instruction) -> bool:
    """Whether this is a product that a collective which was begun before goes on beside."""
    return any(name.startswith("async_collective_fusion") for name in instruction.called)


def _sending(
    module: Module, where: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction itself, or those in what it calls, that send."""
    if _kind(instruction):
        yield where, instruction
    elif instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
        for name in instruction.called:
            for i in module.computations[name].instructions.values():
                yield from _sending(module, module.computations[name], i)


def gathered(module: Module, mesh: Mesh, axis: str, *dims: int) -> list[str]:
    """Names of the instructions that gather an array with all of these dimensions along a mesh axis.

    Of `expert`, and the dimensions of the experts' matrices: what must not be. Each device keeps its own
    experts, and tokens travel to them.
    """
    found = []
    for where in module.computations.values():
        for i in where.instructions.values():
            whole = any(Counter(dims) <= Counter(shape.dims) for shape in i.shapes)
            if whole and _kind(i) == "all-gather" and axis in mesh.varying(_first_group(i, mesh)):
                found.append(i.name)
    return found


def _kind(instruction: Instruction) -> str | None:
    name = instruction.opcode.removesuffix("-start")
    return next((kind for kind in KINDS if kind == name), None)


def _first_group(instruction: Instruction, mesh: Mesh) -> np.ndarray:
    """Partitions of the first group, by any of the four notations that XLA prints."""
    pairs = instruction.attribute("source_target_pairs")
    if pairs is not None:
        ring = re.findall(r"\{(\d+),(\d+)\}", pairs)
        reached = {int(source): int(target) for source, target in ring}
        group = [int(ring[0][0])]
        while (after := reached.get(group[-1])) is not None and after not in group:
            group.append(after)
        return np.array(group)
    groups = _attribute_with_space(instruction, "replica_groups")
    if groups.startswith("mesh["):  # mesh['data'=2,'expert'=4] {'data','expert'}
        lengths = {name: int(length) for name, length in re.findall(r"'([^']+)'=(\d+)", groups)}
        named = re.findall(r"'([^']+)'", groups.partition("{")[2])
        ids = np.arange(int(np.prod(list(lengths.values())))).reshape(tuple(lengths.values()))
        return ids[tuple(slice(None) if name in named else 0 for name in lengths)].reshape(-1)
    if groups.startswith("["):  # [4,2]<=[2,4]T(1,0)
        numbers = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups)
        assert numbers, groups
        shape, source, order = ([int(n) for n in (text or "").split(",") if n] for text in numbers.groups())
        ids = np.arange(int(np.prod(source))).reshape(source)
        return (ids.transpose(order) if order else ids).reshape(shape)[0]
    first = re.search(r"\{([\d,]+)\}", groups)
    return np.array([int(n) for n in first[1].split(",")]) if first else mesh.ids.reshape(-1)


def _attribute_with_space(instruction: Instruction, name: str) -> str:
    """An attribute that goes on behind a space: `mesh[...] {...}`."""
    text = instruction.attribute(name) or "{}"
    behind = re.search(rf"{name}=mesh\[[^\]]*\] (\{{[^}}]*\}})", instruction.attributes)
    return f"{text} {behind[1]}" if behind else text
