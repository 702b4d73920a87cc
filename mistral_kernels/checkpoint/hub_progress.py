"""Progress bars of downloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def delayed_progress() -> Iterator[type]:
    """Yield a class of progress bars that are shown only on a terminal, and after two seconds.

    By default huggingface_hub writes one of its bars into pipes, shows all of its bars also if
    every file is in the cache, and leaves some open: they would be drawn again below later output.
    """
    from huggingface_hub.utils.tqdm import tqdm

    bars: list[tqdm] = []

    class DelayedProgress(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options = {"disable": None, "delay": 2} | options
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]
            bars.append(self)

        def display(self, *args: Any, **options: Any) -> None:
            # tqdm ignores the delay when a description is set.
            if self._time() >= self.start_t + self.delay:
                super().display(*args, **options)

    try:
        yield DelayedProgress
    finally:
        for bar in bars:
            bar.close()
