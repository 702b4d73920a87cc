"""Processes that are the ranks of one group, on this machine alone."""

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
LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    """Return unused ports outside the range from which the system assigns them."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_768), 1000):
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free port")


def environment(timeout: float = 60.0) -> dict[str, str]:
    """Return the environment of any rank: few threads, loopback, a bounded wait."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return kept | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "TORCH_CPP_LOG_LEVEL": "FATAL",  # as `cli.startup` sets it for a command
        "MISTRAL_KERNELS_TIMEOUT": str(timeout),
    }


def start(size: int, *command: object, timeout: float = 60.0) -> list[subprocess.Popen[str]]:
    """Start `python *command` once per rank; each has a session of its own."""
    extension.load("cpu")  # compiled once, not by each
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
    """Wait for the processes, kill them after `seconds`, and return their output and exit codes."""
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
