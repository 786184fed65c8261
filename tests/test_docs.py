"""The pages of docs/, followed to the letter."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import moe.balance
import moe.dispatch
import moe.nn
import moe.routing
from moe.balance import BalanceLoss, Balancer, Controller
from moe.dispatch import Dispatch
from moe.nn import Router
from moe.routing import Blending, Strategy

PROJECT = Path(__file__).parent.parent

# A model and a text so small that a run takes seconds.
TINY = (
    "--train.steps 2 --train.batch_size 2 --data.sequence_length 16 --model.width 8 --model.layers M "
    "--model.dense_width 8 --model.moe.num_experts 4 --model.moe.expert_width 8 --model.moe.dispatch.tile 8 "
    "--data.corpus TextFiles(('texts/*.txt',)) --data.tokenizer Bytes()"
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def follow(command: str, folder: Path) -> str:
    """Run a command of a page, by this interpreter in place of `uv run`, on one device."""
    words = shlex.split(command)
    assert words[:2] == ["uv", "run"]
    program = ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider"] if words[2] == "pytest" else [words[2]]
    extra = TINY.split() if words[2] == "train.py" else []
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    result = subprocess.run(
        [sys.executable, *program, *words[3:], *extra],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_add_a_router(tmp_path):
    for name in ("train.py", "configs", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(PROJECT / name)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(f"{n} sheep crossed the road." for n in range(400)))

    page = (PROJECT / "docs" / "add-a-router.md").read_text()
    (code,) = blocks(page, "python")
    (file,) = re.findall(r"^`(\w+\.py)`, in the folder", page, flags=re.MULTILINE)
    (tmp_path / file).write_text(code)
    test, train = blocks(page, "sh")

    assert re.search(r"\b[1-9]\d* passed", follow(test, tmp_path))
    assert "2 steps done" in follow(train, tmp_path)
    run = tmp_path / "runs" / "exploring"
    assert "my_router.Exploring" in (run / "config.json").read_text()
    assert (run / "metrics.jsonl").read_text().count("\n") >= 1


def test_the_example_fits_the_project_that_it_would_join():
    """The page's code passes the project's own lint."""
    page = (PROJECT / "docs" / "add-a-router.md").read_text()
    for command in (["check", "-"], ["format", "--check", "-"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command],
            input=blocks(page, "python")[0],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_page_of_routing_names_everything_that_a_config_can_say():
    page = (PROJECT / "docs" / "routing.md").read_text()
    rooms = {moe.routing: Strategy, moe.balance: Balancer, moe.dispatch: Dispatch, moe.nn: Router}
    interfaces = {Strategy, Blending, Balancer, BalanceLoss, Controller, Dispatch, Router}
    for room, base in rooms.items():
        for name in room.__all__:
            public = getattr(room, name)
            if isinstance(public, type) and issubclass(public, base) and public not in interfaces:
                assert re.search(rf"`{name}\b", page), f"{name} is missing"
