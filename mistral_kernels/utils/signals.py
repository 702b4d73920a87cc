"""End a process by SIGTERM or SIGHUP only after its `finally` blocks have run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


@contextmanager
def unwinding_when_terminated() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit in the block, and end the process after it."""
    received: list[int] = []

    def unwind(number: int, frame: Any) -> NoReturn:
        received.append(number)
        raise SystemExit(128 + number)

    # Only the main thread may set handlers. Those that the program or nohup has set are kept.
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
