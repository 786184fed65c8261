"""The floors of the house (docs/architecture.md), read off the imports of every file."""

import ast
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "moe"

# A room imports rooms of lower floors only; inside one room files import each other freely.
FLOORS = {
    -1: ["errors"],
    0: ["mesh", "kernels", "quant", "config", "seal", "named_arrays", "machine", "processes"],
    1: ["routing", "balance", "dispatch", "data", "optim", "checkpoint", "metrics", "heatmap", "page"],
    2: ["nn"],
    3: ["experiment", "analysis"],
    4: ["training", "decode", "export"],
    5: ["ablation", "compress"],
    6: ["evaluation"],
}
FLOOR = {room: number for number, rooms in FLOORS.items() for room in rooms}

# The exceptions: what routing decides is a word that its neighbours share; kernels know number formats.
SHARED = {
    ("dispatch", "moe.routing.assignment"),
    ("balance", "moe.routing.assignment"),
    ("kernels", "moe.quant.format"),
    ("kernels", "moe.quant.matrix"),
    ("kernels", "moe.quant.rows"),
}

NOWHERE = {"utils", "util", "helpers", "helper", "common", "misc"}  # names that say nothing
LONGEST = 350  # lines; files aim below 300

FILES = sorted(HOUSE.rglob("*.py"))


def room(file: Path) -> str:
    """The room a file belongs to: the folder or file right inside `moe`."""
    return file.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported(source: str) -> list[str]:
    """Dotted names of all that a file imports, wherever in it; `from a import b` counts as a.b too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def trespasses(here: str, source: str) -> list[str]:
    """What a file of the room `here` imports against the rules."""
    found = []
    for name in imported(source):
        top, *inside = name.split(".")
        if top in ("configs", "tpu", "tests", "train", "eval", "generate", "ablate", "export"):
            found.append(f"{name} stands outside the house")
        if top != "moe" or not inside or inside[0] == here or inside[0] == "__version__":
            continue
        if (here, ".".join(name.split(".")[:3])) in SHARED:
            continue
        if inside[0] not in FLOOR:
            found.append(f"{name} has no floor")
        elif FLOOR[inside[0]] >= FLOOR[here]:
            found.append(f"{name} is on floor {FLOOR[inside[0]]}, {here} on {FLOOR[here]}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))
def test_a_file_imports_only_from_lower_floors(file):
    if file != HOUSE / "__init__.py":
        assert room(file) in FLOOR, "a new room needs a floor"
        assert trespasses(room(file), file.read_text()) == []


def test_the_house_itself_imports_nothing():
    assert imported((HOUSE / "__init__.py").read_text()) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOUSE)))
def test_files_are_short_and_named_for_what_they_hold(file):
    assert not NOWHERE & set(file.relative_to(HOUSE).with_suffix("").parts)
    assert len(file.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize(
    ("here", "source", "wrong"),
    [
        ("nn", "import moe.training.step", "moe.training.step is on floor 4, nn on 2"),
        ("nn", "from moe import training", "moe.training is on floor 4, nn on 2"),
        ("training", "def f():\n    from moe.decode import x", "moe.decode is on floor 4, training on 4"),
        ("dispatch", "from moe.routing import TopK", "moe.routing is on floor 1, dispatch on 1"),
        (
            "data",
            "from moe.routing.assignment import Routing",
            "moe.routing.assignment is on floor 1, data on 1",
        ),
        ("data", "import train", "train stands outside the house"),
        ("data", "from configs.quickstart import config", "configs.quickstart stands outside the house"),
        ("data", "from moe.cellar import x", "moe.cellar has no floor"),
    ],
)
def test_a_trespass_is_noticed(here, source, wrong):
    assert wrong in trespasses(here, source)


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("nn", "from moe.balance import measure\nfrom moe.nn.norm import RMSNorm\nimport jax.export"),
        ("balance", "from moe.routing.assignment import Routing"),
        ("export", "from moe.export.safetensors import write"),
    ],
)
def test_what_is_allowed_is_no_trespass(here, source):
    assert trespasses(here, source) == []
