"""A folder that appears under its name only when it is finished."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe.errors import UserError

WRITING = ".writing"


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which takes its name at the end if nothing went wrong.

    Raises:
        UserError: there is such a folder already, or it cannot be made.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; give another --out, or remove it")
    temporary = folder.with_name(folder.name + WRITING)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {temporary}: {error.strerror}; give another --out") from error
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
