"""Ends a long run on SIGTERM: it finishes what it is at, says how to go on, and has an exit code of its own."""

import signal
import sys
from collections.abc import Callable

STOPPED = 75  # EX_TEMPFAIL: try the same again


def stop_on_sigterm() -> Callable[[], bool]:
    """Whether SIGTERM has come; a second one ends the process at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, lambda number, frame: sys.exit(128 + number))

    signal.signal(signal.SIGTERM, note)
    return lambda: bool(received)
