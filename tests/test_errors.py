"""How a command ends: exit code and what stands on stderr."""

import errno
import os
import subprocess
import sys

import pytest

from moe.errors import UserError, run_main


def end(error: BaseException | None, capsys) -> tuple[int, str]:
    """Exit code and stderr of a `main` that raises this."""

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    printed = capsys.readouterr()
    assert printed.out == ""
    return int(ended.value.code or 0), printed.err


def test_success(capsys) -> None:
    assert end(None, capsys) == (0, "")


def test_user_error_is_one_line(capsys) -> None:
    assert end(UserError("k=9 exceeds\n  8 experts"), capsys) == (2, "error: k=9 exceeds 8 experts\n")


def test_interrupt_is_quiet(capsys) -> None:
    assert end(KeyboardInterrupt(), capsys) == (130, "")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    program = "from moe.errors import run_main; run_main(lambda: print('line\\n' * 100_000))"
    command = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout and command.stdout.readline() == b"line\n"
    command.stdout.close()
    assert command.communicate()[1] == b""
    assert command.returncode == 141


def wrapped(cause: Exception) -> Exception:
    """As a library raises it: the operating system's error is the cause of the library's own."""
    try:
        raise RuntimeError("could not save") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("wrap", [lambda error: error, wrapped])
def test_full_disk_names_the_file(number: int, wrap, capsys) -> None:
    code, printed = end(wrap(OSError(number, os.strerror(number), "runs/a/metrics.jsonl")), capsys)
    assert code == 2
    assert printed.startswith("disk full: runs/a/metrics.jsonl;")
    assert printed.count("\n") == 1


def test_full_disk_reported_as_text(capsys) -> None:
    code, printed = end(
        ValueError("RESOURCE_EXHAUSTED: write failed:\nNo space left on device [x/y]"), capsys
    )
    assert code == 2
    assert printed.startswith("disk full: RESOURCE_EXHAUSTED: write failed: No space left on device [x/y];")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EACCES, "Permission denied")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run_main(main)
    assert caught.value is error
