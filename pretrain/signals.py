"""Being asked to stop: SIGTERM, SIGINT or SIGUSR1 end a run at its next step, after a checkpoint."""

import signal
import sys
from types import FrameType


class StopRequest:
    """`requested` turns True at the first signal. A second Ctrl-C ends the process at once.

    Make it in the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.note)

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
