"""Peers' environments: each of its own, apart from ours, under `.peers/`.

python -m benchmarks.peers.environment transformers
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from moe.errors import UserError, run_main

PYTHON = "3.11"
# llama.cpp's products with AMX end in a segmentation fault on some machines (ggml-org/llama.cpp#20824).
FLAGS = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() == "x86_64" else ""


def peer_python(requirements: Path) -> Path:
    """The interpreter of an environment that holds `requirements`, made first where it is missing.

    torch comes as the build for CPUs; `PIP_FIND_LINKS`, where it is set, says where that lies. A file
    NAME.excludes beside NAME.txt lists what is left out though something asks for it.

    Args:
        requirements: a file of pinned versions, whose name is the environment's.

    Raises:
        UserError: the environment cannot be made.
    """
    root = requirements.resolve().parents[2]
    environment = root / ".peers" / requirements.stem
    python = environment / "bin" / "python"
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise UserError("uv is not on the PATH; it makes the environments of peers")
    wheels = os.environ.get("PIP_FIND_LINKS")
    source = ["--find-links", wheels] if wheels else ["--torch-backend", "cpu"]
    excludes = requirements.with_suffix(".excludes")
    if excludes.exists():
        source += ["--excludes", str(excludes)]
    if not python.exists():
        _run([uv, "venv", "--quiet", "--clear", "--python", PYTHON, str(environment)])
    # Quick where everything is there already, and mends an installation that was cut short.
    _run([uv, "pip", "install", "--quiet", "--python", str(python), *source, "-r", str(requirements)])
    return python


def _run(command: list[str]) -> None:
    flags = {"CFLAGS": FLAGS, "CXXFLAGS": FLAGS}
    result = subprocess.run(command, capture_output=True, text=True, env=flags | os.environ)
    if result.returncode:
        raise UserError(f"{' '.join(command[1:3])} failed: {result.stderr.strip()}")


def main() -> None:
    """Make the environments that are named."""
    for name in sys.argv[1:]:
        print(peer_python(Path(__file__).with_name(f"{name}.txt")))


if __name__ == "__main__":
    run_main(main)
