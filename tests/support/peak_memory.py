"""The most memory that this process has held, for the test programs beside this file."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """Return VmHWM in bytes; ru_maxrss would begin at the size of the process that started this."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
