"""Process group: every failure gives one line and an exit code, and no rank hangs."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.distributed_rank import SCENARIOS, SECONDS
from support.ranks import LAUNCHER_VARIABLES, TESTS, environment, finish, free_ports, start

from mistral_kernels.distributed.process_group import joined, launched

ENDED = "another rank ended; see its error message"
QUIET = (2, "")  # another rank reports the reason


def error(text: str) -> tuple[int, str]:
    return 2, f"error: {text}\n"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[object, str]]]:
    """Run all scenarios on 3 ranks; return exit code and stderr by rank and scenario."""
    folder = tmp_path_factory.mktemp("outcomes")
    ranks = start(3, TESTS / "support" / "distributed_rank.py", folder, *free_ports(len(SCENARIOS)))
    ended = finish(ranks, 120)
    # The last scenario kills rank 1. No rank writes anything outside `run`.
    assert [each.code for each in ended] == [0, -9, 0], ended
    assert not any(each.out + each.err for each in ended), ended
    loaded = []
    for rank in range(3):
        of_rank = json.loads((folder / f"{rank}.json").read_text())
        for name, (_, _, seconds, still_joined) in of_rank.items():
            assert seconds < 3 * SECONDS, name
            assert not still_joined, name
        loaded.append({name: tuple(each[:2]) for name, each in of_rank.items()})
    return loaded


def late(rank: int) -> str:
    return (
        f"rank {rank} of 3 did not join within 3 s (MISTRAL_KERNELS_TIMEOUT); start it, or start "
        "fewer ranks"
    )


def other_world(rank: int, size: int, other: int, others: int) -> tuple[int, str]:
    return error(
        f"rank {rank}: all ranks must be started with the same number of ranks and device: this "
        f"one has {size} ranks on cpu, rank {other} has {others} ranks on cpu"
    )


EXPECTED = {
    "healthy": [(0, "")] * 3,
    "same_error": [error("rank 0: the same everywhere"), QUIET, QUIET],
    "main_call_fails": [
        error("rank 0: invalid literal for int() with base 10: 'x'"),
        *[QUIET] * 2,
    ],
    "last_fails": [
        *(error(f"rank {rank}: {ENDED}") for rank in range(2)),
        error("rank 2: [Errno 2] No such file: 'weights'"),
    ],
    "main_fails": [
        error("rank 0: only here"),
        *(error(f"rank {rank}: {ENDED}") for rank in (1, 2)),
    ],
    "last_lacks_memory": [
        *(error(f"rank {rank}: {ENDED}") for rank in range(2)),
        error(
            "rank 2: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ],
    "bug": [error(f"rank 0: {ENDED}"), ("traceback", ""), error(f"rank 2: {ENDED}")],
    "interrupted": [(130, "\ninterrupted\n"), (130, ""), (130, "")],
    "disagree": [
        error("rank 0: the number must be the same on all ranks: rank 0 has 0, rank 2 has 1"),
        *[QUIET] * 2,
    ],
    "other_world": [other_world(0, 3, 2, 4), QUIET, other_world(2, 4, 0, 3)],
    "healthy_again": [(0, "")] * 3,
    "killed": [error(f"rank 0: {ENDED}"), error(f"rank 2: {ENDED}")],
}


@pytest.mark.parametrize("scenario", EXPECTED)
def test_codes_and_errors(scenario: str, outcomes: list[dict[str, tuple[object, str]]]) -> None:
    assert [each[scenario] for each in outcomes if scenario in each] == EXPECTED[scenario]


def test_an_unresponsive_rank(outcomes: list[dict[str, tuple[object, str]]]) -> None:
    """If a rank does not respond, the others report a timeout, and the rank reports their end."""
    for rank, (code, err) in enumerate(each["silent"] for each in outcomes):
        assert code == 2
        assert err.count("\n") == 1
        reason = r"another rank (did not respond within 3 s \(MISTRAL_KERNELS_TIMEOUT\)|ended; .+)"
        assert re.fullmatch(rf"error: rank {rank}: {reason}\n", err)
    assert "did not respond" in outcomes[0]["silent"][1] + outcomes[2]["silent"][1]


FAILED = r"rendezvous at 127\.0\.0\.1:\d+ failed: .+"  # followed by PyTorch's message


def test_no_main_rank(outcomes: list[dict[str, tuple[object, str]]]) -> None:
    for rank in (1, 2):
        code, err = outcomes[rank]["missing_main"]
        assert code == 2
        assert re.fullmatch(rf"error: rank {rank}: {FAILED}\n", err)


def test_a_rank_is_missing(outcomes: list[dict[str, tuple[object, str]]]) -> None:
    main, other = (each["missing_last"] for each in outcomes[:2])
    assert (main[0], other[0]) == (2, 2)
    assert re.fullmatch(rf"error: rank 0: {FAILED} 2/3 clients joined\.\n", main[1])
    # Rank 0 and its store may end earlier.
    assert other[1] in [f"error: rank 1: {reason}\n" for reason in (late(2), ENDED)]


def test_a_rank_that_is_started_twice(outcomes: list[dict[str, tuple[object, str]]]) -> None:
    codes, lines = zip(*(each["duplicate_rank"] for each in outcomes), strict=True)
    assert codes == (2, 2, 2)
    assert lines[0] == f"error: rank 0: {late(2)}\n"
    second = (
        "error: rank 1: this rank was started twice; check that no other launch uses this port "
        "(MASTER_PORT)\n"
    )
    assert second in lines[1:]


# A group of one rank in this process


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    values = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_ports(1)[0],
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_launched(alone: pytest.MonkeyPatch) -> None:
    assert launched()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        with alone.context() as patch:
            patch.delenv(name)
            assert not launched()


def test_a_world_of_one(alone: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the port is free again
        with joined("cpu") as world:
            assert (world.rank, world.size, world.is_main) == (0, 1, True)
            assert world.from_main(lambda: "result") == "result"
        del world
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "one"}, "RANK must be a number, got 'one'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE must be a number, got '-1'"),
        ({"RANK": "1"}, "RANK must be less than WORLD_SIZE, got 1 and 1"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT must be from 1 to 65535, got 0"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be from 1 to 65535, got 70000"),
        (
            {"MISTRAL_KERNELS_TIMEOUT": "soon"},
            "MISTRAL_KERNELS_TIMEOUT must be a positive number of",
        ),
        ({"MISTRAL_KERNELS_TIMEOUT": "0"}, "must be a positive number of seconds, got '0'"),
        ({"MISTRAL_KERNELS_TIMEOUT": "inf"}, "must be a positive number of seconds, got 'inf'"),
        ({"GLOO_SOCKET_IFNAME": "none0"}, "rank 0: gloo cannot connect: "),
    ],
)
def test_bad_variables(alone: pytest.MonkeyPatch, changes: dict[str, str], message: str) -> None:
    for name, value in changes.items():
        alone.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)), joined("cpu"):
        pass
    assert not dist.is_initialized()


def test_the_port_is_in_use(alone: pytest.MonkeyPatch) -> None:
    """Another program listens at the port: neither rank 0 nor rank 1 can use it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        alone.setenv("MASTER_PORT", str(port))
        alone.setenv("WORLD_SIZE", "2")
        reasons = {
            "0": "the port is in use; choose another (torchrun --master-port, or MASTER_PORT)",
            "1": "rank 0 did not respond within 1 s (MISTRAL_KERNELS_TIMEOUT); check that no other "
            "program uses the port",
        }
        for rank, reason in reasons.items():
            alone.setenv("RANK", rank)
            message = re.escape(f"rank {rank}: rendezvous at 127.0.0.1:{port} failed: {reason}")
            with (
                pytest.raises(ValueError, match=rf"^{message}\Z"),
                joined("cpu", timedelta(seconds=1)),
            ):
                pass


def test_gpus_of_the_ranks(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(torch.cuda, "is_available", lambda: True)
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    alone.setenv("WORLD_SIZE", "8")
    message = (
        "the number of ranks on this machine must be at most 2, its number of GPUs, got 3; start "
        "fewer (torchrun --nproc-per-node) or use --device cpu"
    )
    for local in ({"LOCAL_RANK": "2"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}):
        with alone.context() as patch:
            for name, value in local.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match=re.escape(message)), joined("auto"):
                pass
    message = "--device must not have a GPU index, got cuda:1: each rank has its own GPU; use"
    with pytest.raises(ValueError, match=message), joined("cuda:1"):
        pass


def test_a_command_writes_one_line() -> None:
    """A command disables the log of PyTorch's C++ code, which repeats every error."""
    variables = environment(timeout=1) | {"RANK": "1", "WORLD_SIZE": "2"}
    variables["MASTER_PORT"] = str(*free_ports(1))
    del variables["TORCH_CPP_LOG_LEVEL"]
    ended = subprocess.run(
        [sys.executable, "-m", "mistral_kernels.generate", "x", "--device", "cpu"],
        env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(rf"error: rank 1: {FAILED}\n", ended.stderr)
