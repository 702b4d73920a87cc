"""Run `finally` blocks before SIGTERM or SIGHUP ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


@contextmanager
def unwinding_when_terminated() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit in the block; end the process after the block."""
    received: list[int] = []

    def unwind(number: int, frame: Any) -> NoReturn:
        received.append(number)
        raise SystemExit(128 + number)

    # Only the main thread may set handlers. Handlers set by the program or by nohup are kept.
    replaced = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in replaced:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])
