"""Stand-in for CUDA graphs on the CPU: it runs the code that a graph would replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mistral_kernels.model import engine, generation
from mistral_kernels.model.engine import CudaGraphEngine


class GraphStandIn:
    """Make generation use `CudaGraphEngine`, and count captures and replays.

    As with a CUDA graph, a capture advances the host's lengths and runs nothing; a replay runs the
    step and does not change the host's lengths.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = 0
        monkeypatch.setattr(engine, "capture", self.capture)
        monkeypatch.setattr(generation, "engine_for", CudaGraphEngine)

    def capture(
        self, run: Callable[[], None], generator: torch.Generator | None
    ) -> Callable[[], None]:
        """Stand in for `engine.capture`."""
        cache = run.__self__.cache  # type: ignore[attr-defined]
        self.captures += 1
        cache.host_lengths = [n + 1 for n in cache.host_lengths]

        def replay() -> None:
            self.replays += 1
            lengths = cache.host_lengths
            run()
            cache.host_lengths = lengths

        return replay
