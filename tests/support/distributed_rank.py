"""Run one of three ranks through every scenario: `python distributed_rank.py RESULTS PORT...`.

A program of test_distributed.py. Each scenario has its own port. The rank writes the outcomes, by
scenario, to the folder RESULTS: exit code, stderr, seconds, and whether the group still exists.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mistral_kernels.cli.command import run
from mistral_kernels.distributed.process_group import World, check_same, joined

SECONDS = 3.0  # timeout of the scenarios in which a rank is late
LONG_SECONDS = 60.0  # timeout of the others, on a busy machine too
Body = Callable[[World], None]


def keep_reducing(world: World) -> None:
    """Call collectives until another rank fails."""
    for _ in range(10_000_000):
        dist.all_reduce(torch.ones(3))


def healthy(world: World) -> None:
    total = torch.tensor([world.rank + 1.0])
    dist.all_reduce(total)
    assert total.item() == sum(range(1, world.size + 1))
    assert world.size == dist.get_world_size()
    assert world.is_main == (world.rank == 0)
    assert world.device == torch.device("cpu")
    assert world.from_main(lambda: world.rank + 5) == 5
    check_same("what all have", {"a": 1})


def same_error(world: World) -> None:
    raise ValueError("the same\n everywhere")


def main_call_fails(world: World) -> None:
    world.from_main(lambda: int("x"))


def last_fails(world: World) -> None:
    if world.rank == world.size - 1:
        raise FileNotFoundError(2, "No such file", "weights")
    keep_reducing(world)


def main_fails(world: World) -> None:
    if world.is_main:
        raise ValueError("only here")
    keep_reducing(world)


def last_lacks_memory(world: World) -> None:
    if world.rank == world.size - 1:
        torch.empty(1 << 50)
    keep_reducing(world)


def bug(world: World) -> None:
    if world.rank == 1:
        raise ZeroDivisionError
    keep_reducing(world)


def interrupted(world: World) -> None:
    raise KeyboardInterrupt


def disagree(world: World) -> None:
    check_same("the number", world.rank // 2)


def silent(world: World) -> None:
    if world.rank == 1:
        time.sleep(SECONDS + 2)
    keep_reducing(world)


def killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    keep_reducing(world)


def nothing(world: World) -> None:
    pass


# Body of each rank, environment variables that differ by rank, and ranks that do not start.
SCENARIOS: dict[str, tuple[Body, dict[int, dict[str, str]], set[int]]] = {
    "healthy": (healthy, {}, set()),
    "same_error": (same_error, {}, set()),
    "main_call_fails": (main_call_fails, {}, set()),
    "last_fails": (last_fails, {}, set()),
    "main_fails": (main_fails, {}, set()),
    "last_lacks_memory": (last_lacks_memory, {}, set()),
    "bug": (bug, {}, set()),
    "interrupted": (interrupted, {}, set()),
    "disagree": (disagree, {}, set()),
    "silent": (silent, {}, set()),
    "missing_last": (nothing, {}, {2}),
    "missing_main": (nothing, {}, {0}),
    "other_world": (nothing, {2: {"WORLD_SIZE": "4"}}, set()),
    "duplicate_rank": (nothing, {2: {"RANK": "1"}}, set()),
    "healthy_again": (healthy, {}, set()),
    "killed": (killed, {}, set()),  # must be last: it ends rank 1
}
LATE = ("silent", "missing_last", "missing_main", "duplicate_rank")


def wait_for_all(folder: Path, name: str, mine: int) -> None:
    """Wait until all three ranks are ready to start a scenario."""
    (folder / f"{name}.{mine}").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.glob(f"{name}.?"))) < 3:
        if time.monotonic() > deadline:
            raise TimeoutError(f"3 ranks must start scenario {name} within 60 s")
        time.sleep(0.02)


def main() -> None:
    results, *ports = sys.argv[1:]
    mine = int(os.environ["RANK"])
    own = dict(os.environ)
    outcomes = {}
    for (name, (body, others, missing)), port in zip(SCENARIOS.items(), ports, strict=True):
        wait_for_all(Path(results), name, mine)
        if mine in missing:
            continue
        os.environ.update({**own, "MASTER_PORT": port, **others.get(mine, {})})

        timeout = timedelta(seconds=SECONDS if name in LATE else LONG_SECONDS)

        def command(_: object, body: Body = body, timeout: timedelta = timeout) -> None:
            with joined("cpu", timeout) as world:
                body(world)

        started = time.monotonic()
        with redirect_stderr(io.StringIO()) as err:
            try:
                code: object = run(command, None)  # type: ignore[arg-type]
            except SystemExit as end:
                code = end.code
            except ZeroDivisionError:
                code = "traceback"
        outcomes[name] = (code, err.getvalue(), time.monotonic() - started, dist.is_initialized())
        Path(results, f"{mine}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
