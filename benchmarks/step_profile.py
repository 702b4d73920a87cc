"""Profile of a decode step: its operators, their calls per layer, and the time in Python."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._C import DispatchKey
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

STEPS = 4  # profiled steps; one more counts the Python calls
SHOWN = 8  # operators listed by name

Profile = dict[str, Any]


def profile(step: Callable[[], object], layers: int, device: torch.device) -> Profile:
    """Measure the calls and seconds of a step, operator by operator.

    "kernel" is the time of a GPU's kernels; on a CPU, the time of the operators that compute, their
    dispatch included. "dispatch" is the operators' remaining time: launches, views, allocations.
    "python" is the remaining time of the CPU, part of which is the profiler's own.
    """
    python_calls = _python_calls(step)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        elapsed = time.perf_counter() - start
    operators: dict[str, Profile] = {}
    for event in profiler.events():
        if event.device_type != DeviceType.CPU:
            continue  # the time of a kernel is also counted in its operator
        new = {"name": event.name, "calls": 0.0, "kernel": 0.0, "dispatch": 0.0}
        operator = operators.setdefault(event.name, new)
        operator["calls"] += 1 / STEPS
        computes = device.type == "cpu" and _computes(event.name)
        operator["kernel" if computes else "dispatch"] += event.self_cpu_time_total / STEPS / 1e6
        operator["kernel"] += event.self_device_time_total / STEPS / 1e6
    # A GPU's kernels run at the same time as the CPU.
    on_cpu = sum(
        x["dispatch"] if device.type == "cuda" else _seconds(x) for x in operators.values()
    )
    slowest = sorted(operators.values(), key=_seconds, reverse=True)
    shown, others = slowest[:SHOWN], slowest[SHOWN:]
    if others:
        sums = {x: sum(other[x] for other in others) for x in ("calls", "kernel", "dispatch")}
        shown.append({"name": f"{len(others)} others", **sums})
    return {
        "layers": layers,
        "python_calls": python_calls,
        "python": max(elapsed / STEPS - on_cpu, 0.0),
        "operators": shown,
    }


def _seconds(operator: Profile) -> float:
    return operator["kernel"] + operator["dispatch"]


@functools.cache
def _computes(name: str) -> bool:
    """Return whether an operator is neither a view, nor an allocation, nor a composite."""
    namespace, _, short = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), short, None)
    if packet is None or short.startswith("empty"):
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return not any(
        torch._C._dispatch_has_kernel(x.name())
        and (x.is_view or x.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd))
        for x in overloads
    )


def _python_calls(step: Callable[[], object]) -> int:
    """Count the calls of functions written in Python or C."""
    count = 0

    def count_call(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def summary(profiles: Mapping[str, Profile]) -> str:
    """Return a Markdown table with one row per provider."""
    lines = ["| provider | operators per layer | Python calls per layer | kernel ms | dispatch ms "]
    lines[0] += "| Python ms |"
    lines.append("|---|---:|---:|---:|---:|---:|")
    for provider, found in profiles.items():
        calls, kernel, dispatch = (
            sum(x[name] for x in found["operators"]) for name in ("calls", "kernel", "dispatch")
        )
        lines.append(
            f"| {provider} | {calls / found['layers']:.1f} "
            f"| {found['python_calls'] / found['layers']:.0f} "
            f"| {kernel * 1e3:.2f} | {dispatch * 1e3:.2f} | {found['python'] * 1e3:.2f} |"
        )
    return "\n".join(lines)


def table(found: Profile) -> str:
    """Return a Markdown table with one row per operator, the slowest first."""
    lines = ["| operator | calls | per layer | kernel ms | dispatch ms |"]
    lines.append("|---|---:|---:|---:|---:|")
    lines += [
        f"| {x['name']} | {x['calls']:g} | {x['calls'] / found['layers']:.2f} "
        f"| {x['kernel'] * 1e3:.3f} | {x['dispatch'] * 1e3:.3f} |"
        for x in found["operators"]
    ]
    return "\n".join(lines)
