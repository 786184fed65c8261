"""What a program ran on, and from which commit: speed says nothing without it."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import jax


def machine() -> dict[str, str]:
    """Devices, commit (with a + where files differ from it) and date of now."""
    kind = jax.devices()[0].device_kind
    devices = f"{jax.device_count()} x {kind}"
    if jax.default_backend() == "cpu":
        devices = f"{len(os.sched_getaffinity(0))} cores of {processor()}"
    name, modified = commit()
    return {"devices": devices, "commit": name + "+" * modified, "date": datetime.now(UTC).date().isoformat()}


def processor() -> str:
    """Name of the processor."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpuinfo(field: str) -> str:
    """What Linux tells of the first core under this name; empty where it tells nothing."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")


def commit() -> tuple[str, bool]:
    """The commit of this code, and whether files differ from it.

    Outside a repository it is what the environment variable COMMIT says, or "unknown". Results do not count:
    they are a measurement's own output and may differ.
    """
    try:
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*results*")
        return _git("rev-parse", "--short", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown"), False


def _git(*command: str) -> str:
    root = Path(__file__).parent.parent
    return subprocess.run(
        ["git", *command], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
