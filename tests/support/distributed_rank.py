"""One of three ranks, for test_distributed.py: `python distributed_rank.py RESULTS PORT...`

Goes through every scenario in turn, each on a port of its own, and writes what became of each.
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

SECONDS = 3.0  # how long a rank that is late is waited for
PATIENT = 60.0  # how long one that is not: a busy machine may keep it
Body = Callable[[World], None]


def work_on(world: World) -> None:
    """Keep the other ranks in collectives while something happens to one."""
    for _ in range(10_000_000):
        dist.all_reduce(torch.ones(3))


def well(world: World) -> None:
    total = torch.tensor([world.rank + 1.0])
    dist.all_reduce(total)
    assert total.item() == sum(range(1, world.size + 1))
    assert world.size == dist.get_world_size()
    assert world.is_main == (world.rank == 0)
    assert world.device == torch.device("cpu")
    assert world.from_main(lambda: world.rank + 5) == 5
    check_same("what all have", {"a": 1})


def all_alike(world: World) -> None:
    raise ValueError("the same\n everywhere")


def main_refuses(world: World) -> None:
    world.from_main(lambda: int("x"))


def last_fails(world: World) -> None:
    if world.rank == world.size - 1:
        raise FileNotFoundError(2, "No such file", "weights")
    work_on(world)


def main_fails(world: World) -> None:
    if world.is_main:
        raise ValueError("only here")
    work_on(world)


def last_lacks_memory(world: World) -> None:
    if world.rank == world.size - 1:
        torch.empty(1 << 50)
    work_on(world)


def bug(world: World) -> None:
    if world.rank == 1:
        raise ZeroDivisionError
    work_on(world)


def interrupted(world: World) -> None:
    raise KeyboardInterrupt


def disagree(world: World) -> None:
    check_same("the number", world.rank // 2)


def silent(world: World) -> None:
    if world.rank == 1:
        time.sleep(SECONDS + 2)
    work_on(world)


def killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    work_on(world)


def nothing(world: World) -> None:
    pass


# What each rank does, the variables that it sees in another way, and who does not come.
SCENARIOS: dict[str, tuple[Body, dict[int, dict[str, str]], set[int]]] = {
    "well": (well, {}, set()),
    "all_alike": (all_alike, {}, set()),
    "main_refuses": (main_refuses, {}, set()),
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
    "twice": (nothing, {2: {"RANK": "1"}}, set()),
    "well_again": (well, {}, set()),
    "killed": (killed, {}, set()),  # the last: one rank is no more
}
LATE = ("silent", "missing_last", "missing_main", "twice")


def together(folder: Path, name: str, mine: int) -> None:
    """Wait until all three are about to start the scenario, or one must be gone."""
    (folder / f"{name}.{mine}").touch()
    deadline = time.monotonic() + 60
    while len(list(folder.glob(f"{name}.?"))) < 3:
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.02)


def main() -> None:
    results, *ports = sys.argv[1:]
    mine = int(os.environ["RANK"])
    own = dict(os.environ)
    outcomes = {}
    for (name, (body, others, missing)), port in zip(SCENARIOS.items(), ports, strict=True):
        together(Path(results), name, mine)
        if mine in missing:
            continue
        os.environ.update({**own, "MASTER_PORT": port, **others.get(mine, {})})

        timeout = timedelta(seconds=SECONDS if name in LATE else PATIENT)

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
