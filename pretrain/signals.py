"""Being asked to stop or to save: signals, and the files STOP and SAVE in the run folder.

SIGTERM, SIGINT, SIGUSR1 and RUN/STOP end a run at its next step, after a checkpoint; RUN/SAVE makes one and goes on.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

EXIT_SAVED = 85  # asked to stop, checkpoint written: a launcher starts the same command again
EXIT_RESTART = 86  # another rank did not arrive, or has gone: start again
EXIT_GIVE_UP = 87  # a restart cannot help: read the report
EXIT_INTERRUPTED = 130  # by a second Ctrl-C

STOP, SAVE = "STOP", "SAVE"


class StopRequest:
    """`requested` turns True at the first signal. A second Ctrl-C ends the process at once.

    Make it in the main thread. There Python handles signals, and only between two of its own instructions: a thread that
    waits in a collective for a rank that does not come handles none. What the system's handler itself writes into a pipe is
    there all the same, for another thread to ask `insisted`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupts = 0
        self.told, self.tells = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.tells, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.note)

    def insisted(self) -> bool:
        """Whether Ctrl-C has come twice."""
        with contextlib.suppress(BlockingIOError):
            self.interrupts += os.read(self.told, 4096).count(signal.SIGINT)
        return self.interrupts > 1

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self.tells)
        os.close(self.told)

    def ignore(self) -> None:
        """What there was to save is saved: signals that still come are not to break the ending."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.requested = True
        print(f"{signal.Signals(number).name}: saving after this step ...", file=sys.stderr, flush=True)


def asked(run: str | Path, name: str) -> bool:
    """Whether somebody has put the file STOP or SAVE into the run folder."""
    return os.path.exists(Path(run) / name)  # which takes a file system that does not answer for no


def answered(run: str | Path, *names: str) -> None:
    """Take the files away, as what they asked for is done."""
    for name in names:
        (Path(run) / name).unlink(missing_ok=True)
