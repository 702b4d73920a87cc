"""Start and stop the ranks of one process group on this machine."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mistral_kernels.ops import extension

TESTS = Path(__file__).parents[1]
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
)


class Ended(NamedTuple):
    """Exit code and output of a process that has ended."""

    code: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    """Return unused ports outside the range from which the system assigns ports."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_768), 1000):
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{count} free ports are required, found {len(found)}")


def environment(timeout: float = 60.0) -> dict[str, str]:
    """Return the environment of a rank: one thread, loopback interface, timeout in seconds."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return kept | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "TORCH_CPP_LOG_LEVEL": "FATAL",  # the value that `cli.startup` sets for commands
        "MISTRAL_KERNELS_TIMEOUT": str(timeout),
    }


def start(size: int, *command: object, timeout: float = 60.0) -> list[subprocess.Popen[str]]:
    """Start `python *command` once per rank, each in a new session."""
    extension.load("cpu")  # compile once, before the ranks start
    (port,) = free_ports(1)
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment(timeout)
            | {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[Ended]:
    """Wait for the processes and return their results; kill them after `seconds`."""
    deadline = time.monotonic() + seconds
    ended = []
    try:
        for process in processes:
            left = max(0.1, deadline - time.monotonic())
            out, err = process.communicate(timeout=left)
            ended.append(Ended(process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return ended
