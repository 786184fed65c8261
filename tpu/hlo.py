"""Compiled HLO text as data: computations, their instructions, and how often each of them runs.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and knows nothing of kernels
behind custom calls. So costs are summed here, over `Module.executed()`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BITS = {"pred": 8, "token": 0, "bf16": 16, "opaque": 0}  # other types end in their width: s32, f8e4m3, c64
FAST = 1  # the memory space of VMEM; 0 is HBM


@dataclass(frozen=True)
class Shape:
    """Type, dimensions and memory space of one array."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the array, without the padding of its tiles."""
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.findall(r"\d+", self.dtype)[0])
        return math.ceil(self.size * bits / 8)


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """The result's, flat where it is a tuple."""

    operands: tuple[str, ...]
    """Names of instructions of the same computation."""

    literal: str
    """What stands between the opcode's parentheses."""

    attributes: str
    """What follows them."""

    root: bool = False

    def attribute(self, name: str) -> str | None:
        """The text of an attribute: of `dimensions={0}`, "{0}"; None where there is none."""
        found = re.search(rf"(?:^|, ){re.escape(name)}=", self.attributes)
        return None if found is None else _value(self.attributes, found.end())

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs once for each of its own runs, loops apart."""
        names = [self.attribute(key) for key in ("calls", "to_apply", "called_computations")]
        return tuple(name for text in names if text for name in re.findall(r"%([\w.-]+)", text))

    @property
    def source(self) -> str:
        """Where in the program it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's own estimate, 0 where it gives none: for custom calls and collectives."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run (compiled modules are scheduled)."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The one whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.literal): i for i in found}

    def users(self, name: str) -> list[Instruction]:
        """The instructions that take this one's result."""
        return [i for i in self.instructions.values() if name in i.operands]

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Shapes of the operands, each tuple's flat."""
        return [s for name in instruction.operands for s in self.instructions[name].shapes]


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    @staticmethod
    def parse(text: str) -> "Module":
        """Read what `jax.stages.Compiled.as_text()` gives."""
        computations, entry, here = {}, "", None
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            head = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line)
            if head:
                here = computations[head[2]] = Computation(head[2], {})
                entry = head[2] if head[1] else entry
            elif here is not None and (parsed := _instruction(line)):
                here.instructions[parsed.name] = parsed
        if not entry:
            raise ValueError("no ENTRY computation in this text: is it compiled HLO?")
        return Module(computations, entry)

    def body(self, loop: Instruction) -> Computation:
        """What a `while` repeats."""
        return self.computations[_callee(loop, "body")]

    def branches(self, conditional: Instruction) -> list[Computation]:
        """What a `conditional` chooses from."""
        keys = ("branch_computations", "true_computation", "false_computation")
        texts = (conditional.attribute(key) for key in keys)
        return [self.computations[n] for text in texts if text for n in re.findall(r"%([\w.-]+)", text)]

    def trip_count(self, where: Computation, loop: Instruction) -> int | None:
        """How often a `while` runs its body, None where that shows only while running.

        The loops that JAX's `scan` makes count upwards from a constant to another, by one or more. One that
        something else may end sooner counts with all its runs.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = self.computations[_callee(loop, "condition")], self.body(loop)
        test = condition.root
        if test.opcode == "and":
            parts = (condition.instructions[name] for name in test.operands)
            test = next((part for part in parts if part.opcode == "compare"), test)
        if test.opcode != "compare" or test.attribute("direction") not in ("LT", "LE"):
            return None
        initial = where.instructions[loop.operands[0]]
        index = _index(condition, test.operands[0])
        if index is None or initial.opcode != "tuple":
            return None

        def from_outside(name: str) -> int | None:  # a number the condition compares with
            constant = _constant(condition, name)
            outside = _index(condition, name)
            if constant is None and outside is not None:
                constant = _constant(where, initial.operands[outside])
            return constant

        last, first = from_outside(test.operands[1]), _constant(where, initial.operands[index])
        if last is None or first is None:
            return None
        step = _step(body, index)
        return max(0, math.ceil((last - first + (test.attribute("direction") == "LE")) / step))

    def loops(self) -> list[tuple[Computation, Instruction]]:
        """Every `while`, and the computation that it stands in."""
        everywhere = ((c, i) for c in self.computations.values() for i in c.instructions.values())
        return [(c, i) for c, i in everywhere if i.opcode == "while"]

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Each instruction that does something, with the number of its runs.

        Fusions are one instruction. Of a conditional, all branches count. A loop whose number of runs shows
        only while running does not: ours send what found no room in an exchange's first rounds, and under
        even use all does.
        """
        yield from self._executed(self.computations[self.entry], 1)

    def _executed(self, computation: Computation, times: int):
        for instruction in computation.instructions.values():
            match instruction.opcode:
                case "while":
                    trips = self.trip_count(computation, instruction) or 0
                    yield from self._executed(self.body(instruction), times * trips)
                case "call":
                    for name in instruction.called:
                        yield from self._executed(self.computations[name], times)
                case "conditional":
                    for branch in self.branches(instruction):
                        yield from self._executed(branch, times)
                case _:
                    yield computation, instruction, times


def _callee(instruction: Instruction, key: str) -> str:
    text = instruction.attribute(key)
    assert text is not None, f"{instruction.name} has no {key}"
    return text.lstrip("%")


def _index(computation: Computation, name: str) -> int | None:
    """Which element of the loop's tuple this is, None where it is computed."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    return int(instruction.attribute("index") or 0) if instruction.opcode == "get-tuple-element" else None


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    is_number = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    return int(instruction.literal) if is_number else None


def _step(body: Computation, index: int) -> int:
    """What one run of the body adds to the counter."""
    if body.root.opcode != "tuple":
        return 1
    added = body.instructions[body.root.operands[index]]
    if added.opcode != "add":
        return 1
    return next((n for name in added.operands if (n := _constant(body, name))), 1)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%([\w.-]+) = ", line)
    if not head:
        return None
    shape = _value(line, head.end())
    rest = line[head.end() + len(shape) :].lstrip()
    opcode, _, behind = rest.partition("(")
    literal = _value("(" + behind, 0)
    attributes = behind[len(literal) - 1 :].removeprefix(", ")
    operands = tuple(re.findall(r"%([\w.-]+)", literal)) if opcode != "constant" else ()
    return Instruction(head[2], opcode, _shapes(shape), operands, literal[1:-1], attributes, bool(head[1]))


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.finditer(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    return tuple(
        Shape(
            m[1],
            tuple(int(d.lstrip("<=")) for d in m[2].split(",") if d),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", m[3] or "")) else 0,
        )
        for m in found
    )


def _value(text: str, start: int) -> str:
    """From `start` to the next comma or space outside brackets."""
    depth = 0
    for end in range(start, len(text)):
        if text[end] in "({[":
            depth += 1
        elif text[end] in ")}]":
            depth -= 1
            if depth < 0:
                return text[start:end]
        elif depth == 0 and text[end] in ", ":
            return text[start:end]
    return text[start:]
