"""Progress bars of downloads."""

from __future__ import annotations

from typing import Any


def delayed_progress() -> type:
    """Return a class of progress bars that are shown only on a terminal, and after two seconds.

    By default huggingface_hub writes one of its bars into pipes, and shows all of its bars also if
    every file is in the cache.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class DelayedProgress(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options = {"disable": None, "delay": 2} | options
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **options: Any) -> None:
            # tqdm ignores the delay when a description is set.
            if self._time() >= self.start_t + self.delay:
                super().display(*args, **options)

    return DelayedProgress
