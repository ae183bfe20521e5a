"""Ctrl-C without tracebacks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

#: The exit status after SIGINT.
STATUS = 128 + signal.SIGINT


@contextlib.contextmanager
def second_ends_at_once() -> Iterator[None]:
    """The first SIGINT in the context raises KeyboardInterrupt, as usual. The second one, also if
    it comes after the context, ends the process at once. Otherwise it would raise while the first
    one is handled, or when the interpreter ends, and print a traceback."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def second(number: int, frame: object) -> None:
        os._exit(STATUS)

    def first(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, second)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, signal.default_int_handler)
