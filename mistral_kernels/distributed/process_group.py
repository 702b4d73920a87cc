"""Process group of a command that torchrun started.

The group is PyTorch's: rendezvous through environment variables, NCCL between GPUs, gloo between
CPU processes. `joined` reports each failure of the group as one line and an exit code.
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
# Time for which a failing rank waits for rank 0, to compare the reasons of their failures.
_REPORT_TIMEOUT = timedelta(seconds=1)
# Time that PyTorch may take to raise an error after its own timeout.
_GRACE = timedelta(seconds=5)
# Messages of collectives that fail because another rank has ended or did not respond in time.
_LOST = re.compile(r"gloo/|gloo::|NCCL|Connection (closed|reset)|Broken pipe|Timed out", re.I)

T = TypeVar("T")


def launched() -> bool:
    """Return whether this process is a rank: whether torchrun's environment variables are set."""
    return all(name in os.environ for name in _VARIABLES)


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and the number of ranks."""

    rank: int
    size: int
    device: torch.device
    # Group of the same ranks without a timeout, for `from_main`, which may wait for user input.
    _untimed: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True for rank 0, the only rank that prints and writes files."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result on every rank, without a timeout.

        The result is pickled. If `make` raises an error for bad input, every rank raises an error.
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
        dist.broadcast_object_list(made, src=0, group=self._untimed)
        value, why = made
        if why is not None:
            raise failure or ValueError(why)
        return value  # type: ignore[no-any-return]


@contextmanager
def joined(device_name: str, timeout: timedelta | None = None) -> Iterator[World]:
    """Create torch.distributed's default group of all ranks, and destroy it at the end.

    If a rank leaves the context with an exception, the collectives of the other ranks fail, and
    each of them raises a ValueError with one line. The rank that has bad input (an error that
    `command.run` reports in one line) reports it. If all ranks have the same error, only rank 0
    reports it.

    Args:
        device_name: value of the option `--device`; on CUDA, each rank uses the GPU of its local
            rank.
        timeout: limit of the wait for other ranks and of every collective. None: the number of
            seconds in the variable MISTRAL_KERNELS_TIMEOUT, or 5 minutes.

    Yields:
        The world of this rank.

    Raises:
        ValueError: a variable is invalid; a GPU or a rank is missing; the port is in use; the
            ranks were started with different numbers of ranks or devices; another rank has
            ended; or the block has bad input. The message begins with the rank, except for a
            variable or a GPU.
        SystemExit: rank 0 reports the same bad input, or an interrupt.
    """
    rank, size = _read_environment()
    timeout = timeout or _timeout()
    world = World(rank, size, _device(device_name, rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    store = _connect(world, timeout)
    failed = True
    try:
        untimed = _call_within(timeout, lambda: _join(world, store, timeout))
        yield replace(world, _untimed=untimed)
        dist.barrier()  # rank 0 hosts the store, so it must not end before the other ranks
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
        reason = "another rank ended; see its error message"
        if "timed out" in str(error).lower():
            reason = f"another rank did not respond within {_seconds(timeout)}"
        raise ValueError(f"rank {rank}: {reason}") from error
    finally:
        if dist.is_initialized():
            if failed and dist.group.WORLD is not None:
                dist.group.WORLD.abort()  # otherwise NCCL waits for the other ranks
            dist.destroy_process_group()


def check_same(name: str, value: Any) -> None:
    """Raise `ValueError` on every rank unless all ranks have the same `value`."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"{name} must be the same on all ranks: rank 0 has {values[0]}, "
                f"rank {rank} has {other}"
            )


def _read_environment() -> tuple[int, int]:
    """Return the rank and the number of ranks from the environment variables."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = os.environ[name]
        if not text.isdecimal():
            raise ValueError(f"{name} must be a number, got {text!r}")
        numbers[name] = int(text)
    rank, size, port = numbers.values()
    if not rank < size:
        raise ValueError(f"RANK must be less than WORLD_SIZE, got {rank} and {size}")
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
        raise ValueError(
            f"--device must not have a GPU index, got {name}: each rank has its own GPU; use "
            "--device cuda"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if local_size > torch.cuda.device_count():
        raise ValueError(
            f"the number of ranks on this machine must be at most {torch.cuda.device_count()}, its "
            f"number of GPUs, got {local_size}; start fewer (torchrun --nproc-per-node) or use "
            "--device cpu"
        )
    return torch.device("cuda", local_rank)


def _seconds(timeout: timedelta) -> str:
    return f"{timeout.total_seconds():g} s ({TIMEOUT_VARIABLE})"


def _call_within(timeout: timedelta, action: Callable[[], T]) -> T:
    """Call `action` in a thread and return its result; raise TimeoutError if it takes too long.

    PyTorch's wait for a store ignores Ctrl-C, and it never ends if another program accepts the
    connection and does not respond.
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
    """Return the store of the rendezvous, which rank 0 or torchrun's agent hosts."""
    try:
        store, _, _ = _call_within(
            timeout, lambda: next(dist.rendezvous("env://", timeout=timeout))
        )
    except (dist.DistError, TimeoutError) as error:
        reason = str(error).partition("\n")[0]
        if not reason:
            reason = (
                f"rank 0 did not respond within {_seconds(timeout)}; check that no other program "
                "uses the port"
            )
        elif "EADDRINUSE" in reason:
            reason = "the port is in use; choose another (torchrun --master-port, or MASTER_PORT)"
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"rank {world.rank}: rendezvous at {address} failed: {reason}") from None
    return store  # type: ignore[no-any-return]


def _join(world: World, store: dist.Store, timeout: timedelta) -> dist.ProcessGroup:
    """Create the default group. Return a second group of the same ranks, without a timeout."""
    _check_ranks(world, store, timeout)
    backend = "gloo"
    if world.device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # gloo for pickled objects, which stay on the CPU
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
        )
        untimed = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        # Without the barrier, a rank that fails while others connect would cause a network error.
        dist.barrier()
    except RuntimeError as error:
        raise ValueError(f"{backend} cannot connect: {str(error).splitlines()[0]}") from None
    return untimed  # type: ignore[no-any-return]


def _check_ranks(world: World, store: dist.Store, timeout: timedelta) -> None:
    """Wait for all ranks. Raise ValueError if one is missing, duplicate or started differently."""
    if store.add(f"count/{world.rank}", 1) > 1:
        raise ValueError(
            "this rank was started twice; check that no other launch uses this port (MASTER_PORT)"
        )
    mine = f"{world.size} ranks on {world.device.type}"
    store.set(f"world/{world.rank}", mine)
    for rank in range(world.size):
        try:
            theirs = store.get(f"world/{rank}").decode()
        except dist.DistStoreError:
            # Report the last missing rank: rank 0 may be present and still wait for another rank.
            others = range(rank, world.size)
            last = max((r for r in others if not store.check([f"world/{r}"])), default=rank)
            raise ValueError(
                f"rank {last} of {world.size} did not join within {_seconds(timeout)}; start it, "
                "or start fewer ranks"
            ) from None
        if theirs != mine:
            raise ValueError(
                "all ranks must be started with the same number of ranks and device: this one has "
                f"{mine}, rank {rank} has {theirs}"
            )


def _reported_by_main(message: str, world: World, store: dist.Store) -> bool:
    """Return whether rank 0 reports the same error, so that this rank need not report it.

    Rank 0 waits up to `_REPORT_TIMEOUT` for the other ranks to read its error from the store.
    """
    try:
        if world.is_main:
            store.set("error", message)
            store.wait([f"heard/{rank}" for rank in range(1, world.size)], _REPORT_TIMEOUT)
            return False
        store.wait(["error"], _REPORT_TIMEOUT)
        reported = store.get("error").decode() == message
        store.set(f"heard/{world.rank}", "")
        return reported
    except RuntimeError:  # a timeout, or rank 0 and its store have ended
        return False
