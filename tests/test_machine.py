"""The commit that a result is of."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

from moe import machine


def test_the_commit_and_whether_files_differ_from_it(tmp_path):
    """Files that git does not know and results make no difference."""
    copy = tmp_path / "moe" / "machine.py"
    copy.parent.mkdir()
    shutil.copy(str(machine.__file__), copy)
    source = importlib.util.spec_from_file_location("copied_machine", copy)
    assert source and source.loader
    copied = importlib.util.module_from_spec(source)
    source.loader.exec_module(copied)
    assert copied.commit() == ("unknown", False)

    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.name", "tester")
    git(tmp_path, "config", "user.email", "tester@example.org")
    results = tmp_path / "docs" / "results" / "cpu.md"
    results.parent.mkdir(parents=True)
    results.write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    name = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert copied.commit() == (name, False)

    (tmp_path / "new.py").touch()
    results.write_text("2\n")
    assert copied.commit() == (name, False)
    copy.write_text(copy.read_text() + "\n")
    assert copied.commit() == (name, True)


def git(folder: Path, *command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()
