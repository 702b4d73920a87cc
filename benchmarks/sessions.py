"""Measurement of cases in several sessions, each of which times every case.

Over minutes, the speed of a shared machine changes more than the times within one session vary. The
inputs of a case stay in memory from its first session to its last.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable

import torch

from benchmarks import timing
from benchmarks.registry import OURS, Case, Operator, Prepared, first_line

MIN_ROUNDS, MAX_ROUNDS = 5, 100  # per case, over all its sessions
UNTIMED = 8  # calls before the timed ones, at most: warm-up and profile


class Measurement:
    """Times of one case by provider, and the reasons of the providers that were not timed."""

    def __init__(
        self, operator: Operator, case: Case, providers: Iterable[str], device: torch.device
    ) -> None:
        self.operator, self.case, self.device = operator, case, device
        self.refused: dict[str, str] = {}
        self.memory: dict[str, int | None] = {}
        self.profiles: dict[str, object] = {}
        self.times: dict[str, list[list[float]]] = {}  # seconds, session by session
        self._calls: dict[str, Prepared] = {}
        self._round_seconds = 0.0
        self.peak_work = 0.0  # FLOPs or bytes of one call of the peak
        for provider in providers:
            if reason := operator.unfit(provider, case, device):
                self.refused[provider] = reason
                continue
            try:
                self._admit(provider)
            except Exception as error:
                self._refuse(provider, error)
        if self._calls and device.type != "meta":
            self._calls[self.peak], self.peak_work = timing.peak(self.peak, device, case.dtype)

    @property
    def peak(self) -> str:
        """Return the name of the machine's peak that limits the case."""
        if self.operator.bound_of(self.case) == "FLOP":
            return timing.GEMM
        return timing.READ if self.operator.only_reads else timing.COPY

    def _admit(self, provider: str) -> None:
        """Warm up a provider, measure its memory and profile, and estimate its time."""
        prepared = self.operator.prepare(provider, self.case, self.device)
        if self.operator.measures_memory and provider not in self.operator.allocates_before:
            prepared(0)()  # reads mapped weights and allocates caches, which are not the call's
            start = time.perf_counter()
            self.memory[provider] = timing.peak_memory(prepared(1), self.device)
        else:
            self._timed(prepared, 0)  # may compile
            start = time.perf_counter()
            self._timed(prepared, 1)
        self._round_seconds += time.perf_counter() - start
        profile = self.operator.profile(provider, self.case, prepared(2), self.device)
        if profile is not None:
            self.profiles[provider] = profile
        self._calls[provider] = prepared

    def _timed(self, prepared: Prepared, i: int) -> float:
        """Return the seconds of call i.

        On a CPU, an untimed call with other inputs precedes a memory-bound call. The code is then
        in the caches, and the inputs of the timed call are not. The outputs of the untimed call are
        held until the timed call ends: otherwise the timed call would reuse their memory.
        """
        if self.device.type != "cpu" or self.operator.bound_of(self.case) != "byte":
            return timing.timed(prepared(i), self.device)
        before = prepared(2 * i)()
        elapsed = timing.timed(prepared(2 * i + 1), self.device)
        del before
        return elapsed

    def _refuse(self, provider: str, error: Exception) -> None:
        self.refused[provider] = first_line(error)
        self._calls.pop(provider, None)
        self.times.pop(provider, None)
        gc.collect()  # after an out-of-memory error: its traceback held tensors
        torch.cuda.empty_cache()

    def run_session(self, session: int, sessions: int, seconds: float) -> None:
        """Time session number `session` (from 0) of `sessions`, which take `seconds` together.

        Every round times all providers and the machine's peak once, in random order, so that all
        of them meet the same state of the machine. An interrupted round is dropped.
        """
        rounds = int(seconds / self._round_seconds) if self._round_seconds else MIN_ROUNDS
        rounds = 1 if self.device.type == "meta" else max(MIN_ROUNDS, min(rounds, MAX_ROUNDS))
        times: dict[str, list[float]] = {}
        try:
            for i in range(rounds * session // sessions, rounds * (session + 1) // sessions):
                for name, elapsed in self._round(i).items():
                    times.setdefault(name, []).append(elapsed)
        finally:
            for name in times.keys() & self._calls.keys():
                self.times.setdefault(name, []).append(times[name])

    def _round(self, i: int) -> dict[str, float]:
        found = {}
        for name in random.sample(list(self._calls), len(self._calls)):
            try:
                found[name] = self._timed(self._calls[name], i)
            except Exception as error:
                self._refuse(name, error)
        return found

    def release(self) -> None:
        self._calls.clear()
        self.operator.release()

    def all_times(self, name: str) -> list[float]:
        """Return the seconds of a provider, or of a peak."""
        return [x for times in self.times[name] for x in times]

    def over_ours(self, provider: str) -> list[list[float]] | None:
        """Return the ratios to our time in the same round, session by session."""
        if OURS.name not in self.times:
            return None
        return [
            [a / b for a, b in zip(*session, strict=True)]
            for session in zip(self.times[provider], self.times[OURS.name], strict=True)
        ]


def measure(
    plan: Iterable[tuple[Operator, Case, list[str]]],
    device: torch.device,
    seconds: float,
    sessions: int,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[dict[tuple[str, Case], Measurement], bool]:
    """Measure all cases in `sessions` sessions.

    Returns:
        The measurements by operator and case, and whether Ctrl-C ended them early. The completed
        rounds of an interrupted run are kept.
    """
    plan = list(plan)
    found: dict[tuple[str, Case], Measurement] = {}
    interrupted = False
    start, timed = time.perf_counter(), 0.0
    try:
        for done, (operator, case, providers) in enumerate(plan, start=1):
            begin = time.perf_counter()
            measurement = Measurement(operator, case, providers, device)
            found[operator.name, case] = measurement
            prepared = time.perf_counter()
            measurement.run_session(0, sessions, seconds)
            end = time.perf_counter()
            timed += end - prepared
            first_session = (end - start) / done * (len(plan) - done)
            left = first_session + timed / done * len(plan) * (sessions - 1)
            line = f"{operator.name} {case}: {end - begin:.1f} s"
            report(f"[{done}/{len(plan)}] {line}; {_remaining(left)}")
            if sessions == 1:
                measurement.release()
        for session in range(1, sessions):
            begin = time.perf_counter()
            for measurement in found.values():
                measurement.run_session(session, sessions, seconds)
            elapsed = time.perf_counter() - begin
            left = elapsed * (sessions - session - 1)
            report(f"session {session + 1} of {sessions}: {elapsed:.1f} s; {_remaining(left)}")
    except KeyboardInterrupt:
        interrupted = True
        report("interrupted: the rounds completed so far are reported")
    for measurement in found.values():
        measurement.release()
    return found, interrupted


def _remaining(seconds: float) -> str:
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
