"""What the instructions of a compiled program are for, read off XLA's text of it.

The text says from which source lines an instruction comes. The innermost line inside this repository says
the part of the model; the instruction's own name and that of the JAX operation behind it say its kind.
"""

import re

# Parts of a model by source file, from the root of the repository; the longest name that fits counts.
PARTS = {
    "moe/kernels/attention.py": "attention",
    "moe/nn/attention.py": "attention projections",
    "moe/nn/latent_attention.py": "attention projections",
    "moe/decode/cache.py": "attention",
    "moe/decode/": "sampling",
    "moe/nn/norm.py": "norms",
    "moe/kernels/": "experts",
    "moe/kernels/permute.py": "dispatch and combine",
    "moe/nn/feed_forward.py": "experts",
    "moe/nn/latent_projection.py": "experts",
    "moe/dispatch/": "dispatch and combine",
    "moe/nn/router.py": "routing",
    "moe/nn/moe_layer.py": "routing",
    "moe/routing/": "routing",
    "moe/balance/": "routing",
    "moe/nn/transformer.py": "residual stream and embedding",
    "moe/kernels/linear_cross_entropy.py": "output head and loss",
    "moe/nn/parameter.py": "weights to compute precision",
    "moe/training/": "optimizer and metrics",
    "moe/optim.py": "optimizer and metrics",
}
# These serve several: the line that called them says which.
WITHOUT_PART = ("moe/kernels/linear.py", "moe/kernels/quantized_matmul.py")
REST = "the rest"

COMMUNICATION, COPIES, ELEMENT_WISE = "communication", "copies", "element-wise and reductions"
COLLECTIVES = ("all-", "reduce-scatter", "collective", "ragged-all-to-all", "send", "recv")
WORDS = {
    "attention": r"fmha|dot_product_attention|flash|splash",
    "matrix products": r"dot|gemm|matmul|cublas|ynn|onednn|mosaic|pallas|mpmd|swiglu|product|conv_general",
    "sorting and gathering": r"sort|gather|scatter|top_k|topk|dynamic",
}
"""Kinds of operation by what their names contain, the first that fits."""

# Opcodes that start no kernel.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional",
    "after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "async-done", "async-update",
}  # fmt: skip

INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%?(?P<name>[\w.\-]+) = (?:\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<line>.*)$", re.MULTILINE
)
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
APPLIED = re.compile(r"(?:calls|to_apply|comparator)=%?([\w.\-]+)")
FRAME = re.compile(r"stack_frame_id=(\d+)")
# The last part of an operation's name: those before it are the functions around it.
NAMES = re.compile(r'(?:op_name="(?:[^"]*/)?|custom_call_target=")([^"/]*)"')


def parts(compiled: str) -> dict[str, str]:
    """The part of each instruction of a compiled program."""
    stacks = _stacks(compiled)
    framed = ((found, FRAME.search(found["line"])) for found in INSTRUCTION.finditer(compiled))
    return {found["name"]: _part(stacks[int(frame[1])]) for found, frame in framed if frame}


def kinds(compiled: str) -> dict[str, str]:
    """The kind of operation of each instruction of a compiled program."""
    return {found["name"]: _kind(found) for found in INSTRUCTION.finditer(compiled)}


def kernels_launched(compiled: str) -> int:
    """Kernels that one run of a program starts, with every loop's body counted once.

    What is fused into another instruction, or applied element by element, is none of its own; nor is what
    only names or groups memory.
    """
    inside = {name for line in compiled.splitlines() for name in _applied(line)}
    count, outer = 0, True
    for line in compiled.splitlines():
        if header := COMPUTATION.match(line):
            outer = header[1] not in inside
        elif outer and (found := INSTRUCTION.match(line)):
            count += found["opcode"] not in FREE
    return count


def _applied(line: str) -> list[str]:
    """Computations that become part of the kernel of the instruction in this line."""
    found = INSTRUCTION.match(line)
    return [] if not found or found["opcode"] == "call" else APPLIED.findall(line)


def _kind(found: re.Match[str]) -> str:
    opcode, line = found["opcode"], found["line"]
    if opcode.startswith(COLLECTIVES):
        return COMMUNICATION
    if opcode.startswith(("copy", "transpose")):
        return COPIES
    label = " ".join([found["name"], *NAMES.findall(line)])
    return next((kind for kind, words in WORDS.items() if re.search(words, label)), ELEMENT_WISE)


def _part(stack: list[str]) -> str:
    for file in stack:
        if not file.endswith(WITHOUT_PART):
            fitting = [name for name in PARTS if f"/{name}" in file]
            if fitting:
                return PARTS[max(fitting, key=len)]
    return REST


def _stacks(compiled: str) -> dict[int, list[str]]:
    """Files of each stack frame and of those around it, the innermost first."""

    def section(title: str, pattern: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", compiled, re.MULTILINE)
        rows = (re.match(rf"(\d+) .*?{pattern}", row) for row in (found[1] if found else "").splitlines())
        return {int(row[1]): row[2] for row in rows if row}

    files = section("FileNames", '"(.*)"')
    location_file = section("FileLocations", r"file_name_id=(\d+)")
    frame_location = section("StackFrames", r"file_location_id=(\d+)")
    frame_parent = section("StackFrames", r"parent_frame_id=(\d+)")

    def stack(frame: int) -> list[str]:
        here = []
        while frame:
            here.append(files[int(location_file[int(frame_location[frame])])])
            frame = int(frame_parent[frame]) - 1  # as XLA prints it, one too many
        return here

    return {frame: stack(frame) for frame in frame_location}
