"""The process group of a command that torchrun started: joined, watched over, and left.

The engine is PyTorch's own: NCCL between GPUs, gloo between CPU processes. What is here makes each
way in which a group can fail one line and an exit code, and lets none of them hang.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mistral_kernels.cli.command import device_of
from mistral_kernels.cli.startup import BAD_INPUT, INTERRUPTED
from mistral_kernels.utils.errors import reason_of

TIMEOUT_VARIABLE = "MISTRAL_KERNELS_TIMEOUT"
_DEFAULT_TIMEOUT = timedelta(minutes=5)
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a rank that fails waits to hear whether all fail alike.
_LINGER = 1.0
_POLL = 0.05
# What a collective says when another rank has gone, or has not come in time.
_LOST = re.compile(r"gloo/|gloo::|NCCL|Connection (closed|reset)|Broken pipe|Timed out", re.I)

T = TypeVar("T")


def launched() -> bool:
    """Was this process started as a rank of several, by torchrun or in its way?"""
    return all(name in os.environ for name in _VARIABLES)


@dataclass(frozen=True)
class World:
    """The ranks that work together, and which of them this process is. Of size 1, it is alone."""

    rank: int
    size: int
    device: torch.device
    # For what may take the main rank any time, such as its user's typing.
    _patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Is this the rank that prints and writes?"""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, on every rank, however long it takes.

        It travels as a pickle. Where `make` raises for bad input, every rank raises.
        """
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                made[0] = make()
            except Exception as error:
                if (reason := reason_of(error)) is None:
                    raise
                made[1], failure = reason, error
        dist.broadcast_object_list(made, src=0, group=self._patient)
        value, why = made
        if why is not None:
            raise failure or ValueError(why)
        return value


@contextmanager
def joined(device_name: str, timeout: timedelta | None = None) -> Iterator[World]:
    """Inside, torch.distributed's default group holds all ranks, on the device of `--device`.

    `timeout` bounds the wait for the others and every collective; None: the seconds of the variable
    MISTRAL_KERNELS_TIMEOUT, or 5 minutes.

    When a rank leaves by an exception, so do the others: their collectives fail, which is told in
    one line. Bad input (the errors that `command.run` tells in a line) is told by the rank that has
    it, or by rank 0 alone where it is the same on all.

    Raises:
        ValueError: a variable, a GPU or a rank is missing, the port is in use, the ranks disagree
            about the world; another rank has ended; bad input, with the rank's number in front.
        SystemExit: rank 0 tells of the same bad input, or of the interrupt.
    """
    rank, size, address = _read_environment()
    timeout = timeout or _timeout()
    world = World(rank, size, _device(device_name, rank))
    store = _connect(world, address, timeout)
    failed = True
    try:
        yield replace(world, _patient=_meet(world, store, timeout))
        dist.barrier()  # the main rank, whose store the others use, is not the first to go
        failed = False
    except KeyboardInterrupt:
        if world.is_main:
            raise
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if (reason := reason_of(error)) is not None:
            if _told_by_main(reason, world, store):
                raise SystemExit(BAD_INPUT) from None
            raise ValueError(f"rank {rank}: {reason}") from error
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        reason = "another rank ended; see what it says"
        if "timed out" in str(error).lower():
            seconds = f"{timeout.total_seconds():g} s ({TIMEOUT_VARIABLE})"
            reason = f"another rank did not answer within {seconds}"
        raise ValueError(f"rank {rank}: {reason}") from error
    finally:
        if dist.is_initialized():
            _leave(failed)


def check_same(what: str, value: Any) -> None:
    """Raise `ValueError` on every rank unless `value`, which `what` names, is one for all."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"{what} must be the same on all ranks: rank 0 has {values[0]}, "
                f"rank {rank} has {other}"
            )


def _read_environment() -> tuple[int, int, tuple[str, int]]:
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ValueError(f"{missing[0]} is not set; start the ranks with torchrun")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ[name]
        if not text.isdecimal():
            raise ValueError(f"{name} must be a number, got {text!r}")
        numbers[name] = int(text)
    rank, size, port = numbers.values()
    if not rank < size:
        raise ValueError(f"RANK must be below WORLD_SIZE, got {rank} of {size}")
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT must be from 1 to 65535, got {port}")
    return rank, size, (os.environ["MASTER_ADDR"], port)


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return _DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a positive number of seconds, got {text!r}")
    return timedelta(seconds=seconds)


def _device(name: str, rank: int) -> torch.device:
    device = device_of(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(f"--device {name}: each rank has a GPU of its own; use --device cuda")
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    wanted = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if wanted > torch.cuda.device_count():
        raise ValueError(
            f"{wanted} ranks on a machine of {torch.cuda.device_count()} GPUs; start fewer "
            "(torchrun --nproc-per-node) or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def _connect(world: World, address: tuple[str, int], timeout: timedelta) -> dist.Store:
    """The store through which the ranks find one another: served by rank 0, or torchrun's agent."""
    serves = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # Bound, and waited for, in Python: the store logs failures at length, and Ctrl-C does not
        # end its waiting.
        listener = _listen(address[1]).detach() if serves else None
        if not serves:
            _await_listener(address, timeout)
        store = _open_store(address, world, listener, timeout)
    except (OSError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, dist.DistError):
            reason = f"no rank 0 answers ({reason}); is the port another program's?"
        elif error.errno == errno.EADDRINUSE:
            reason = "it is in use; choose another (torchrun --master-port, or MASTER_PORT)"
        raise ValueError(
            f"rank {world.rank}: cannot meet at {address[0]}:{address[1]}: {reason}"
        ) from None
    # What an earlier attempt of an elastic launch left in the agent's store is not for this one.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"mistral_kernels/{attempt}", store)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _await_listener(address: tuple[str, int], timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection(address, timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank 0 did not come within {timeout.total_seconds():g} s "
                    f"({TIMEOUT_VARIABLE}): {error.strerror or error}"
                ) from None
        time.sleep(_POLL)


def _open_store(
    address: tuple[str, int], world: World, listener: int | None, timeout: timedelta
) -> dist.TCPStore:
    """In a thread: who accepts a connection and never answers would hold the store for ever."""
    made: SimpleQueue[dist.TCPStore | Exception] = SimpleQueue()
    serves = listener is not None

    def make() -> None:
        try:
            made.put(
                dist.TCPStore(
                    *(*address, world.size, serves, timeout),
                    wait_for_workers=False,
                    master_listen_fd=listener,
                )
            )
        except Exception as error:
            made.put(error)

    with _quiet_store():
        Thread(target=make, daemon=True).start()
        try:
            store = made.get(timeout=timeout.total_seconds())
        except Empty:
            store = dist.DistNetworkError(f"not within {timeout.total_seconds():g} s")
    if isinstance(store, Exception):
        raise store
    return store


def _meet(world: World, store: dist.Store, timeout: timedelta) -> dist.ProcessGroup:
    """See that every rank is there, once, and means the same world; then form the group.

    Returns another group of the same ranks, whose collectives wait as long as it takes.
    """
    with _quiet_store():
        _call_roll(world, store, timeout)
    backend = "gloo"
    if world.device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # objects and messages need no GPU
        torch.cuda.set_device(world.device)
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        with _quiet_store():
            _await_connections(world, store, timeout)
    except RuntimeError as error:
        raise ValueError(f"{backend} cannot connect: {str(error).splitlines()[0]}") from None
    return patient


def _await_connections(world: World, store: dist.Store, timeout: timedelta) -> None:
    """Wait for the others: a rank that left now would break the connections that they still make.

    Gloo logs that at length, and the reason would seem to be the network's.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    count = store.add("connected", 1)
    while count < world.size:
        if time.monotonic() > deadline:
            raise ValueError(
                f"only {count} of {world.size} ranks connected within "
                f"{timeout.total_seconds():g} s ({TIMEOUT_VARIABLE})"
            )
        time.sleep(_POLL)
        count = store.add("connected", 0)


def _call_roll(world: World, store: dist.Store, timeout: timedelta) -> None:
    if store.add(f"count/{world.rank}", 1) > 1:
        raise ValueError("it was started twice; does another launch use this port (MASTER_PORT)?")
    mine = f"{world.size} ranks on {world.device.type}"
    store.set(f"world/{world.rank}", mine)
    deadline = time.monotonic() + timeout.total_seconds()
    first = None
    for rank in range(world.size):
        while not store.check([f"world/{rank}"]):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rank {rank} of {world.size} did not come within "
                    f"{timeout.total_seconds():g} s ({TIMEOUT_VARIABLE}); start it, or fewer"
                )
            time.sleep(_POLL)
        theirs = store.get(f"world/{rank}").decode()
        first = first or theirs
        if first != mine:
            rank, theirs = world.rank, mine
        if first != theirs:
            raise ValueError(
                f"rank 0 was started as one of {first}, rank {rank} as one of {theirs}; "
                "start all alike"
            )


def _told_by_main(message: str, world: World, store: dist.Store) -> bool:
    """Does the main rank fail for the same reason? It stays a moment for the others to ask."""
    heard = [f"heard/{rank}" for rank in range(1, world.size)]
    deadline = time.monotonic() + _LINGER
    try:
        with _quiet_store():
            if world.is_main:
                store.set("error", message)
            while not store.check(heard if world.is_main else ["error"]):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL)
            if world.is_main:
                return False
            same = store.get("error").decode() == message
            store.set(heard[world.rank - 1], "")
            return same
    except RuntimeError:  # the main rank has gone, and the store with it
        return False


@contextmanager
def _quiet_store() -> Iterator[None]:
    """Keep the store from writing a C++ stack trace of each error, beside raising it."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _leave(failed: bool) -> None:
    if failed and dist.group.WORLD is not None:
        dist.group.WORLD.abort()  # NCCL would wait for the others' part of what is under way
    dist.destroy_process_group()
