"""Profile of a decode step: its operators, how often a layer calls them, and the Python."""

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

STEPS = 4  # that are profiled; one more is counted
SHOWN = 8  # operators

Profile = dict[str, Any]


def profile(step: Callable[[], object], layers: int, device: torch.device) -> Profile:
    """Measure calls and seconds of a step, operator by operator.

    "kernel" is what a GPU's kernels take; on a CPU, what operators do that compute, their dispatch
    included. "dispatch" is the rest of what operators take: launches, views, allocations. "python"
    is what is left of the CPU's time, some of which the profiler takes itself.
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
            continue  # a kernel, whose time is its operator's too
        new = {"name": event.name, "calls": 0.0, "kernel": 0.0, "dispatch": 0.0}
        operator = operators.setdefault(event.name, new)
        operator["calls"] += 1 / STEPS
        computes = device.type == "cpu" and _computes(event.name)
        operator["kernel" if computes else "dispatch"] += event.self_cpu_time_total / STEPS / 1e6
        operator["kernel"] += event.self_device_time_total / STEPS / 1e6
    # A GPU's kernels run beside what the CPU does.
    on_cpu = sum(
        x["dispatch"] if device.type == "cuda" else _seconds(x) for x in operators.values()
    )
    return {
        "layers": layers,
        "python_calls": python_calls,
        "python": max(elapsed / STEPS - on_cpu, 0.0),
        "operators": sorted(operators.values(), key=_seconds, reverse=True),
    }


def _seconds(operator: Profile) -> float:
    return operator["kernel"] + operator["dispatch"]


@functools.cache
def _computes(name: str) -> bool:
    """Return whether an operator is no view, no allocation and not composed of others."""
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
    """Count calls of functions, written in Python or in C."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def summary(profiles: Mapping[str, Profile]) -> str:
    """Return Markdown: a row for each provider."""
    lines = ["| one step of | operators a layer | Python calls a layer | kernel ms | dispatch ms "]
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
    """Return Markdown: a row for each operator, the slowest first."""
    shown, others = found["operators"][:SHOWN], found["operators"][SHOWN:]
    if others:
        rest = {x: sum(other[x] for other in others) for x in ("calls", "kernel", "dispatch")}
        shown = [*shown, {"name": f"{len(others)} others", **rest}]
    lines = ["| operator | calls | a layer | kernel ms | dispatch ms |"]
    lines.append("|---|---:|---:|---:|---:|")
    lines += [
        f"| {x['name']} | {x['calls']:g} | {x['calls'] / found['layers']:.2f} "
        f"| {x['kernel'] * 1e3:.3f} | {x['dispatch'] * 1e3:.3f} |"
        for x in shown
    ]
    return "\n".join(lines)
