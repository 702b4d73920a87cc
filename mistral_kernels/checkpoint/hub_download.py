"""Download with huggingface_hub: delayed progress bars, and interrupts that take effect at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any


def download(fetch: Callable[..., str], **options: Any) -> str:
    """Return `fetch(**options)`, where `fetch` is a partial call of `snapshot_download`.

    After an interrupt, huggingface_hub completes the files that it is downloading, which may take
    minutes. Therefore `fetch` runs in another thread, and an interrupt ends it at the next update
    of its progress.
    """
    with _progress_bars() as (bar_class, stopped), ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(fetch, tqdm_class=bar_class, **options)
            while wait([future], timeout=0.1).not_done:  # a signal might not end a long wait
                pass
            return future.result()
        finally:
            stopped.set()


@contextmanager
def _progress_bars() -> Iterator[tuple[type, threading.Event]]:
    """Yield a class of progress bars, and an event after which their updates raise an error.

    The bars are shown only on a terminal, and after two seconds. By default huggingface_hub writes
    one of its bars into pipes, and shows all bars also if every file is in the cache. It leaves
    some bars open, which would be drawn again below later output.
    """
    from huggingface_hub.utils.tqdm import tqdm

    bars: list[tqdm] = []
    stopped = threading.Event()

    class DelayedProgress(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options = {"disable": None, "delay": 2} | options
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise InterruptedError("the download was interrupted")
            return super().update(n)  # type: ignore[no-any-return]

        def display(self, *args: Any, **options: Any) -> None:
            # tqdm ignores the delay when a description is set.
            if self._time() >= self.start_t + self.delay:
                super().display(*args, **options)

    try:
        yield DelayedProgress, stopped
    finally:
        for bar in bars:
            bar.close()
