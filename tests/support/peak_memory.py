"""Peak memory of this process, for the test programs in this folder."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """Return VmHWM in bytes; ru_maxrss would include the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
