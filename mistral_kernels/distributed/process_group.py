"""The process group of a command that torchrun started.

It is PyTorch's own: the rendezvous through the environment, NCCL between GPUs, gloo between CPU
processes. `joined` turns each way in which a group can fail into one line and an exit code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
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
# How long a rank that fails waits to learn whether rank 0 fails for the same reason.
_LINGER = timedelta(seconds=1)
# How long PyTorch may take to raise an error once its own timeout has passed.
_GRACE = timedelta(seconds=5)
# Errors of a collective when another rank has ended, or has not answered in time.
_LOST = re.compile(r"gloo/|gloo::|NCCL|Connection (closed|reset)|Broken pipe|Timed out", re.I)

T = TypeVar("T")


def launched() -> bool:
    """Return whether this process was started as a rank, by torchrun or with its variables."""
    return all(name in os.environ for name in _VARIABLES)


@dataclass(frozen=True)
class World:
    """The number of ranks, and the rank and device of this process."""

    rank: int
    size: int
    device: torch.device
    # The same ranks without a timeout, for `from_main`: its caller may wait for a user's typing.
    _patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on the main rank, and return its result on every rank, without a timeout.

        The result is pickled. Where `make` raises for bad input, every rank raises.
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
        return value  # type: ignore[no-any-return]


@contextmanager
def joined(device_name: str, timeout: timedelta | None = None) -> Iterator[World]:
    """Hold torch.distributed's default group of all ranks, on the device of `--device`.

    `timeout` bounds the wait for the other ranks and every collective; None: the seconds of the
    variable MISTRAL_KERNELS_TIMEOUT, or 5 minutes.

    When a rank leaves by an exception, the collectives of the others fail, and they leave with one
    line each. Bad input (the errors that `command.run` reports in a line) is reported by the rank
    that has it, or by rank 0 alone where it is the same on all.

    Raises:
        ValueError: a variable, a GPU or a rank is missing, the port is in use, the ranks were
            started with different worlds; another rank has ended; bad input, with the rank's number
            in front.
        SystemExit: rank 0 reports the same bad input, or the interrupt.
    """
    rank, size = _read_environment()
    timeout = timeout or _timeout()
    world = World(rank, size, _device(device_name, rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    store = _connect(world, timeout)
    failed = True
    try:
        patient = _call_within(timeout, lambda: _join(world, store, timeout))
        yield replace(world, _patient=patient)
        dist.barrier()  # rank 0, which serves the store of the others, must not leave first
        failed = False
    except KeyboardInterrupt:
        if world.is_main:
            raise
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if (reason := reason_of(error)) is not None:
            if _reported_by_main(reason, world, store):
                raise SystemExit(BAD_INPUT) from None
            raise ValueError(f"rank {rank}: {reason}") from error
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        reason = "another rank ended; see what it says"
        if "timed out" in str(error).lower():
            reason = f"another rank did not answer within {_seconds(timeout)}"
        raise ValueError(f"rank {rank}: {reason}") from error
    finally:
        if dist.is_initialized():
            if failed and dist.group.WORLD is not None:
                dist.group.WORLD.abort()  # NCCL would wait for the others' part of its work
            dist.destroy_process_group()


def check_same(what: str, value: Any) -> None:
    """Raise `ValueError` on every rank unless all have the same `value`, which `what` names."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"{what} must be the same on all ranks: rank 0 has {values[0]}, "
                f"rank {rank} has {other}"
            )


def _read_environment() -> tuple[int, int]:
    """Return the rank and the number of ranks."""
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
    return rank, size


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


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s ({TIMEOUT_VARIABLE})"


def _call_within(timeout: timedelta, action: Callable[[], T]) -> T:
    """Return `action()`, called in a thread; raise TimeoutError if it takes too long.

    PyTorch's waiting for a store ignores Ctrl-C, and never ends where another program accepts the
    connection and does not answer.
    """
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(action())
        except Exception as error:
            result.set_exception(error)

    Thread(target=call, daemon=True).start()
    return result.result((timeout + _GRACE).total_seconds())


def _connect(world: World, timeout: timedelta) -> dist.Store:
    """Return the store of the rendezvous, which rank 0 serves, or torchrun's agent."""
    try:
        store, _, _ = _call_within(
            timeout, lambda: next(dist.rendezvous("env://", timeout=timeout))
        )
    except (dist.DistError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        if not reason:
            reason = f"no rank 0 answers within {_seconds(timeout)}; is the port another program's?"
        elif "EADDRINUSE" in reason:
            reason = "it is in use; choose another (torchrun --master-port, or MASTER_PORT)"
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"rank {world.rank}: cannot meet at {address}: {reason}") from None
    return store  # type: ignore[no-any-return]


def _join(world: World, store: dist.Store, timeout: timedelta) -> dist.ProcessGroup:
    """Form the default group. Return another group of the same ranks, without a timeout."""
    _check_ranks(world, store, timeout)
    backend = "gloo"
    if world.device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # objects and messages need no GPU
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        # A rank that failed before the others are connected would be reported as a network error.
        dist.barrier()
    except RuntimeError as error:
        raise ValueError(f"{backend} cannot connect: {str(error).splitlines()[0]}") from None
    return patient  # type: ignore[no-any-return]


def _check_ranks(world: World, store: dist.Store, timeout: timedelta) -> None:
    """Wait for every rank. Raise ValueError unless each is there once, with the same world."""
    if store.add(f"count/{world.rank}", 1) > 1:
        raise ValueError("it was started twice; does another launch use this port (MASTER_PORT)?")
    mine = f"{world.size} ranks on {world.device.type}"
    store.set(f"world/{world.rank}", mine)
    for rank in range(world.size):
        try:
            theirs = store.get(f"world/{rank}").decode()
        except dist.DistStoreError:
            # Name the last: rank 0 may be serving the store and waiting, itself, for another rank.
            others = range(rank, world.size)
            last = max((r for r in others if not store.check([f"world/{r}"])), default=rank)
            raise ValueError(
                f"rank {last} of {world.size} did not come within {_seconds(timeout)}; start it, "
                "or fewer"
            ) from None
        if theirs != mine:
            raise ValueError(
                f"all ranks must be started alike: this one is of {mine}, rank {rank} of {theirs}"
            )


def _reported_by_main(message: str, world: World, store: dist.Store) -> bool:
    """Return whether rank 0 fails for the same reason. It waits a moment for the others to ask."""
    try:
        if world.is_main:
            store.set("error", message)
            store.wait([f"heard/{rank}" for rank in range(1, world.size)], _LINGER)
            return False
        store.wait(["error"], _LINGER)
        reported = store.get("error").decode() == message
        store.set(f"heard/{world.rank}", "")
        return reported
    except RuntimeError:  # not in time, or rank 0 has ended, and the store with it
        return False
