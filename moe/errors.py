"""The one exception that means: the user can mend this. And how a command ends with it or a full disk."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

UNFINISHED = os.EX_TEMPFAIL
"""Exit code (75) of a command that was asked to stop, or lost another of its processes: nothing is wrong, and
the same command goes on. Launchers start it again."""


class UserError(Exception):
    """Bad input. The message is one line that names the field or file and how to mend it.

    Entry points print it and exit with code 2; nothing else catches it.
    """


def run_main(main: Callable[[], object]) -> NoReturn:
    """Runs an entry point's `main` and ends the process; what the user can mend is one line on stderr.

    Exit code 0 when `main` returns, 2 after a `UserError` or a full disk, 130 after Ctrl-C (as shells
    expect of SIGINT), 141 when nobody reads on what it prints, as in `train.py --help | head`. Any other
    exception is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except (KeyboardInterrupt, Exception) as error:
        code, line = ending(error)
        if line is None:
            raise
        print(line, end="", file=sys.stderr)
        if isinstance(error, BrokenPipeError):  # or the interpreter would try to print the rest as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(code)
    sys.exit(0)


def ending(error: BaseException) -> tuple[int, str | None]:
    """Exit code and last words of a command that an exception ends; no words where it is a bug of ours."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, ""
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, UserError):
        return 2, f"error: {one_line(error)}\n"
    full_disk = next(filter(_is_full_disk, _chain(error)), None)
    if full_disk is not None:
        return 2, f"disk full: {_place(full_disk)}; free some space and run the same command again\n"
    return 1, None


def one_line(error: BaseException | str) -> str:
    """The message of an exception, of any library, folded into a single line."""
    return " ".join(str(error).split())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and those that led to it: libraries wrap the operating system's error in their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_full_disk(error: BaseException) -> bool:
    # TensorStore, under Orbax, reports the errno only as text.
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or os.strerror(errno.ENOSPC) in str(error)


def _place(error: BaseException) -> str:
    filename = getattr(error, "filename", None)
    return one_line(os.fspath(filename)) if isinstance(filename, str | os.PathLike) else one_line(error)
