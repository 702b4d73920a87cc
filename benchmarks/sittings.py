"""Timing of cases in several sittings, each a whole round of all cases.

A machine that is shared drifts over minutes, more than the times of one sitting scatter. What a
case needs stays in memory from its first sitting to its last.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable

import torch

from benchmarks import timing
from benchmarks.registry import OURS, Case, Operator, Prepared, in_a_line

MIN_ROUNDS, MAX_ROUNDS = 5, 100  # of a case, in all its sittings together
UNTIMED = 8  # calls besides, at most: to warm up, and for a profile


class Trial:
    """One case: the refused providers and their reasons, and the times of the others."""

    def __init__(
        self, operator: Operator, case: Case, providers: Iterable[str], device: torch.device
    ) -> None:
        self.operator, self.case, self.device = operator, case, device
        self.refused: dict[str, str] = {}
        self.memory: dict[str, int | None] = {}
        self.profiles: dict[str, object] = {}
        self.times: dict[str, list[list[float]]] = {}  # sitting by sitting
        self._calls: dict[str, Prepared] = {}
        self._round = 0.0  # seconds
        for provider in providers:
            if reason := operator.unfit(provider, case, device):
                self.refused[provider] = reason
                continue
            try:
                self._admit(provider)
            except Exception as error:
                self._refuse(provider, error)
        if self._calls:
            peaks = timing.peaks(device, case.dtype)
            self._calls |= {name: call for name, (call, _) in peaks.items()}

    def _admit(self, provider: str) -> None:
        prepared = self.operator.prepare(provider, self.case, self.device)
        if self.operator.measures_memory:
            start = time.perf_counter()
            self.memory[provider] = timing.peak_memory(prepared(0), self.device)
        else:
            self._timed(prepared, 0)  # which may compile
            start = time.perf_counter()
            self._timed(prepared, 1)
        self._round += time.perf_counter() - start
        profile = self.operator.profile(provider, self.case, prepared(0), self.device)
        if profile is not None:
            self.profiles[provider] = profile
        self._calls[provider] = prepared

    def _timed(self, prepared: Prepared, turn: int) -> float:
        """Return the seconds of a call; on a CPU, after a similar call if it is bound by memory.

        Its code is in the caches then, as on a GPU its launches are queued, and its data are not:
        a turn has its own. What the call before returned is held, or the memory would be used
        again.
        """
        if self.device.type != "cpu" or self.operator.bound_of(self.case) != "byte":
            return timing.timed(prepared(turn), self.device)
        before = prepared(2 * turn)()
        elapsed = timing.timed(prepared(2 * turn + 1), self.device)
        del before
        return elapsed

    def _refuse(self, provider: str, error: Exception) -> None:
        self.refused[provider] = in_a_line(error)
        self._calls.pop(provider, None)
        self.times.pop(provider, None)
        gc.collect()  # out of memory, perhaps, and its traceback held tensors
        torch.cuda.empty_cache()

    def sit(self, sitting: int, sittings: int, seconds: float) -> None:
        """Time one of `sittings` rounds (from 0), which have `seconds` together.

        All providers and the machine's peaks are timed round by round, and so meet the same
        machine. Each round has an order of its own: no call always follows the same one.
        """
        rounds = int(seconds / self._round) if self._round else MIN_ROUNDS
        rounds = 1 if self.device.type == "meta" else max(MIN_ROUNDS, min(rounds, MAX_ROUNDS))
        turns = range(rounds * sitting // sittings, rounds * (sitting + 1) // sittings)
        if not turns:
            return
        for name in self._calls:
            self.times.setdefault(name, []).append([])
        for turn in turns:
            for name in random.sample(list(self._calls), len(self._calls)):
                try:
                    elapsed = self._timed(self._calls[name], turn)
                except Exception as error:
                    self._refuse(name, error)
                else:
                    self.times[name][-1].append(elapsed)

    def release(self) -> None:
        self._calls.clear()
        self.operator.release()

    def all_times(self, name: str) -> list[float]:
        """Return the times of a provider, or of a peak."""
        return [x for times in self.times[name] for x in times]

    def over_ours(self, provider: str) -> list[float] | None:
        """Return times over ours of the same round."""
        if OURS.name not in self.times:
            return None
        return [
            a / b for a, b in zip(self.all_times(provider), self.all_times(OURS.name), strict=True)
        ]


def hold(
    plan: Iterable[tuple[Operator, Case, list[str]]],
    device: torch.device,
    seconds: float,
    sittings: int,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[tuple[str, Case], Trial]:
    """Return the trials of all cases, which are timed in `sittings` rounds."""
    trials = {}
    for operator, case, providers in plan:
        start = time.perf_counter()
        trial = trials[operator.name, case] = Trial(operator, case, providers, device)
        prepared = time.perf_counter()
        trial.sit(0, sittings, seconds)
        done = time.perf_counter()
        tell(
            f"{operator.name} {case}: prepared in {prepared - start:.1f} s, "
            f"sitting 1 of {sittings}: {done - prepared:.1f} s"
        )
        if sittings == 1:
            trial.release()
    for sitting in range(1, sittings):
        start = time.perf_counter()
        for trial in trials.values():
            trial.sit(sitting, sittings, seconds)
        tell(f"sitting {sitting + 1} of {sittings}: {time.perf_counter() - start:.1f} s")
    for trial in trials.values():
        trial.release()
    return trials
