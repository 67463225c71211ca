"""The errors that a user sees, and the one place that turns them into a line on stderr and an exit code.

Exit codes: 0 done; 1 the disk is full (free space and run the same command again); 2 a user's mistake; 130 Ctrl-C.
"""

import difflib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterable
from typing import Any

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_USER_FILE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EEXIST,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


class UserError(Exception):
    """A mistake or a condition that the user can mend.

    Its text is one clear line: where, what was found, what is valid or what to do.
    """


def suggest(word: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the entry of `valid` that is nearest to `word`, or "" when none is near."""
    nearest = difflib.get_close_matches(word, list(valid), n=1)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's library says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(function: Callable[..., int | None], *arguments: Any, **options: Any) -> int:
    """Run a command's function and return the process's exit code (the function's own result, None counting as 0).

    A UserError, a full disk, an unusable file and Ctrl-C end in one line on stderr. Everything else is a mistake of
    the program and keeps its traceback.
    """
    try:
        return function(*arguments, **options) or 0
    except UserError as error:
        return _refuse(str(error), 2)
    except KeyboardInterrupt:
        return _refuse("interrupted. Run the same command again to go on", 130)
    except OSError as error:
        if error.errno in _DISK_FULL:
            where = error.filename or "a file that was being written"
            return _refuse(f"{where}: the disk is full. Free space and run the same command again", 1)
        if error.errno in _USER_FILE and error.filename is not None:
            return _refuse(f"{error.filename}: {error.strerror}. Check the path and its permissions", 2)
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return 0
        raise


def _refuse(text: str, exit_code: int) -> int:
    print(f"error: {text}", file=sys.stderr, flush=True)
    return exit_code


def _output_is_closed() -> bool:
    """Whether the reader of stdout has gone (as in `... info DIR | head -3`); if so, keep Python's exit silent."""
    poll = select.poll()
    poll.register(1, 0)
    closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed
