"""A folder or a file that appears under its name only when it is finished."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.errors import UserError

WRITING = ".writing"


@contextmanager
def finished_folder(out: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `out`, which takes its name at the end if nothing went wrong.

    Raises:
        UserError: `out` is there already, or the folder cannot be made.
    """
    with _temporary(out) as folder:
        yield folder
        folder.rename(out)


@contextmanager
def finished_file(out: Path) -> Iterator[Path]:
    """The same for a file: gives its path in a temporary folder."""
    with _temporary(out) as folder:
        yield folder / out.name
        (folder / out.name).rename(out)


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    if out.exists():
        raise UserError(f"{out} is there already; give another --out, or remove it")
    folder = out.with_name(out.name + WRITING)
    try:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another --out") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
