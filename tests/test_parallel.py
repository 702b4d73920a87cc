"""Tensor parallelism: several processes give the same logits and texts as one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.parallel_rank import GREEDY, PROMPTS, SCENARIOS, results_of
from support.ranks import TESTS, environment, finish, free_ports, start
from support.small_checkpoints import SMALL, random_state, varied_model

from benchmarks import parallel_model
from benchmarks.make_checkpoint import CONFIGS, random_tensors
from mistral_kernels import MistralConfig, MistralForCausalLM, MistralTokenizer
from mistral_kernels.checkpoint import open_checkpoint, resolve, save_hf, save_raw, whole
from mistral_kernels.checkpoint.names import expected_shapes
from mistral_kernels.distributed.tensor_parallel import (
    ParallelMistralForCausalLM,
    Share,
    memory_per_rank,
)
from mistral_kernels.generate import generate
from mistral_kernels.model.config import ConfigError

# With 2 key/value heads, each is on 2 of 4 ranks. The vocabulary of 61 tokens is a prime number.
CONFIG = replace(SMALL, num_attention_heads=8, num_key_value_heads=2)
TIED = replace(CONFIG, tie_word_embeddings=True, sliding_window=(7, None, 3), num_key_value_heads=4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder of checkpoints. Those with uppercase names are only used by the command."""
    folder = tmp_path_factory.mktemp("parallel") / "checkpoints"
    save_hf(varied_model(CONFIG).state_dict().items(), CONFIG, folder / "hf", dtype=torch.float32)
    save_raw(varied_model(CONFIG).state_dict().items(), CONFIG, folder / "raw", dtype=torch.float32)
    for name in ("hf", "raw"):
        shutil.copy(resolve("tiny") / "tokenizer.model", folder / name)
    save_raw(varied_model(TIED).state_dict().items(), TIED, folder / "tied", dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def chat_models(checkpoints: Path) -> None:
    package = pytest.importorskip("mistral_common", reason="extra `chat` is not installed")
    data = Path(package.__file__).parent / "data"
    config = replace(SMALL, vocab_size=32768)
    state = varied_model(config).state_dict()
    for name in ("CHAT", "RETOKENIZED"):
        save_hf(state.items(), config, checkpoints / name, dtype=torch.float32)
        shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", checkpoints / name)
    # The same vocabulary, but other token ids for a prompt.
    (checkpoints / "RETOKENIZED" / "tokenizer_config.json").write_text('{"add_bos_token": false}')


@pytest.fixture(scope="module")
def ranks(checkpoints: Path, chat_models: None) -> dict[int, list[dict[str, Any]]]:
    """Return the results of every rank, for 2 and for 4 ranks."""
    results = {}
    for size, ports in ((2, free_ports(len(SCENARIOS))), (4, [])):
        processes = start(size, TESTS / "support" / "parallel_rank.py", checkpoints, *ports)
        ended = finish(processes, 240)
        assert all(each == (0, "", "") for each in ended), ended
        results[size] = [
            torch.load(checkpoints.parent / f"{size}-{rank}.pt") for rank in range(size)
        ]
    return results


@pytest.mark.parametrize("name", ["hf", "raw", "tied"])
@pytest.mark.parametrize("size", [2, 4])
def test_results_equal_those_of_one_process(
    size: int, name: str, checkpoints: Path, ranks: dict[int, list[dict[str, Any]]]
) -> None:
    expected = results_of(MistralForCausalLM.from_pretrained(checkpoints / name))
    config = TIED if name == "tied" else CONFIG
    for actual in (each[name] for each in ranks[size]):
        for key in ("forward", "prefill", "decode"):
            assert actual[key].shape == expected[key].shape
            error = (actual[key] - expected[key]).abs().max() / expected[key].abs().max()
            assert error < 1e-4, key
            # Bitwise equal on all ranks, so that all ranks choose the same tokens.
            assert torch.equal(actual[key], ranks[size][0][name][key])
        assert actual["greedy"] == expected["greedy"]
        assert actual["sampled"] == expected["sampled"]
        # 2 all-reduces per layer and 1 of the embedding; the all-gather is that of the head.
        assert actual["collectives"] == {
            "all_reduce": 2 * config.num_hidden_layers + 1,
            "all_gather_into_tensor": 1,
            "wait_tensor": 2 * config.num_hidden_layers + 2,
        }
        replicas = max(1, size // config.num_key_value_heads)
        assert actual["cache"] * size == expected["cache"] * replicas
    assert expected["collectives"] == {}
    held = sum(each[name]["weights"] for each in ranks[size])
    shared = sum(
        torch.Size(shape).numel() * (size - 1 if len(shape) == 1 else replicas - 1)
        for tensor, shape in expected_shapes(config).items()
        if len(shape) == 1 or ".k_proj" in tensor or ".v_proj" in tensor
    )
    assert held == expected["weights"] + shared


@pytest.mark.parametrize("size", [2, 4])
def test_int8(size: int, checkpoints: Path, ranks: dict[int, list[dict[str, Any]]]) -> None:
    """Each rank quantizes its share: as accurate as one process, and equal on all ranks."""
    ids = torch.tensor(PROMPTS[1:2])
    with torch.inference_mode():
        exact, single = (
            MistralForCausalLM.from_pretrained(checkpoints / "hf", quantize=quantize)(ids).logits
            for quantize in (None, "int8")
        )
    for actual in (each["int8"] for each in ranks[size]):
        assert 0 < (actual - exact).norm() < 1.5 * (single - exact).norm()
        assert torch.equal(actual, ranks[size][0]["int8"])


def command_results(
    ranks: dict[int, list[dict[str, Any]]], name: str
) -> list[tuple[int, str, str]]:
    return [each[name] for each in ranks[2]]


def test_the_command(ranks: dict[int, list[dict[str, Any]]]) -> None:
    main, other = command_results(ranks, "greedy")
    model = MistralForCausalLM.from_pretrained("tiny", dtype=torch.float32)
    tokenizer = MistralTokenizer.from_pretrained("tiny")
    (expected,) = generate(model, tokenizer, ["She was"], max_tokens=20)
    assert main[:2] == (0, expected.text + "\n")
    assert other == (0, "", "")
    for pattern in (
        r"^load +[\d.]+ s, 5\.\d MB of float32 on rank 0 of 2$",
        r"^memory +[\d,]+ MB at the peak, cache [\d.]+ MB on rank 0 of 2$",
    ):
        assert re.search(pattern, main[2], re.MULTILINE), main[2]


def test_rank_0_determines_the_prompt_and_the_random_seed(
    ranks: dict[int, list[dict[str, Any]]],
) -> None:
    """Sample in bfloat16. With different prompts or seeds, the ranks would not agree on tokens."""
    main, other = command_results(ranks, "random")
    record = json.loads(main[1])
    assert (main[0], record["prompt"], len(record["token_ids"])) == (0, "She was", 20)
    assert other == (0, "", "")


def test_chat(ranks: dict[int, list[dict[str, Any]]]) -> None:
    main, other = command_results(ranks, "chat")
    assert (main[0], main[2]) == (0, "")
    assert main[1].count("\n") >= 2
    assert other == (0, "", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_prompt", r"rank 0: prompt must not be empty"),
        ("no_model", r"rank 0: no such folder: '/no/such'[;,] .+"),
        ("other_option", r"rank 0: --top-k must be the same on all ranks: rank 0 has 0, rank 1 .+"),
        ("other_model", r"rank 0: the checkpoint must be the same on all ranks: .+"),
        ("other_tokenizer", r"rank 0: the tokenizer must be the same on all ranks: .+"),
    ],
)
def test_bad_input_is_reported_by_one_rank(
    name: str, message: str, ranks: dict[int, list[dict[str, Any]]]
) -> None:
    main, other = command_results(ranks, name)
    assert main[:2] == (2, ""), main
    assert re.fullmatch(f"error: {message}\n", main[2]), main
    assert other == (2, "", "")


def test_a_gpu_by_number(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for code, out, err in command_results(ranks, "gpu"):
        assert (code, out, err.count("\n")) == (2, "", 1)
        # Without a GPU, the message is that of `device_of`.
        assert "--device must " in err
        assert "cuda:0" in err


# Shares of the ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_shares_cover_the_model(size: int) -> None:
    """Every weight is on a rank; only norms and key/value heads may be on several ranks."""
    config = replace(
        CONFIG,
        num_attention_heads=12,
        num_key_value_heads=6 if size != 4 else 4,
        intermediate_size=144,
    )
    for name, shape in expected_shapes(config).items():
        holders = torch.zeros(shape, dtype=torch.int)
        for rank in range(size):
            share = Share(config, rank, size)
            part = holders[share.part_of(name, shape)]
            part += 1
            if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
                assert tuple(part.shape) == expected_shapes(share.local_config)[name]
        replicas = 1
        if len(shape) == 1:
            replicas = size
        elif ".k_proj" in name or ".v_proj" in name:
            replicas = max(1, size // config.num_key_value_heads)
        assert (holders == replicas).all(), name


def test_query_heads_are_with_their_kv_heads() -> None:
    """On every rank, local query head h reads local kv head h // (heads // kv heads)."""
    config = replace(CONFIG, num_attention_heads=24, num_key_value_heads=4)
    dim, group = config.head_dim, 6
    for size in (1, 2, 4, 8, 12, 24):
        config_of = replace(config, intermediate_size=240)
        for rank in range(size):
            share = Share(config_of, rank, size)
            local = share.local_config
            (queries,) = share.part_of("model.layers.0.self_attn.q_proj.weight", (24 * dim, 40))
            (keys,) = share.part_of("model.layers.0.self_attn.k_proj.weight", (4 * dim, 40))
            for head in range(local.num_attention_heads):
                own = head // (local.num_attention_heads // local.num_key_value_heads)
                assert (queries.start // dim + head) // group == keys.start // dim + own


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (
            3,
            {},
            "num_attention_heads must be divisible by the number of ranks, 3, got 8: start a "
            "number of ranks that divides it",
        ),
        (
            4,
            {"intermediate_size": 70},
            "intermediate_size must be divisible by the number of ranks, 4, got 70",
        ),
        (
            4,
            {"num_attention_heads": 24, "num_key_value_heads": 6},
            "num_key_value_heads must be a divisor or a multiple of the number of ranks, 4, got 6: "
            "start another number of ranks",
        ),
    ],
)
def test_indivisible_models_raise(size: int, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Share(replace(CONFIG, **changes), 0, size)


@pytest.mark.parametrize("save", [save_hf, save_raw])
def test_reading_a_part(save: Any, tmp_path: Path) -> None:
    """Read arbitrary rows and columns, also of raw projections, whose rows are permuted."""
    save(random_state(CONFIG).items(), CONFIG, tmp_path / "m", dtype=torch.float32)
    stored = open_checkpoint(tmp_path / "m")
    full = {name: tensor.clone() for name, tensor in stored.tensors()}
    for _ in range(5):
        parts: dict[str, tuple[slice, ...]] = {}

        def part_of(name: str, shape: tuple[int, ...], parts: Any = parts) -> tuple[slice, ...]:
            ends = [sorted(torch.randint(0, n + 1, (2,)).tolist()) for n in shape]
            ends = [(a, b) if a < b else (0, n) for (a, b), n in zip(ends, shape, strict=True)]
            parts[name] = tuple(slice(a, b) for a, b in ends)[: 1 + len(parts) % 2]
            return parts[name]

        for name, tensor in stored.tensors(part_of):
            assert torch.equal(tensor, full[name][parts[name]]), name
        assert parts.keys() == full.keys()
    assert whole("x", (3, 4)) == (slice(None),)


# A group of one rank in this process


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_alone(checkpoints: Path, group: None) -> None:
    model = ParallelMistralForCausalLM.from_pretrained(
        checkpoints / "hf", sliding_window=5, device_map="cpu", revision="main"
    )
    plain = MistralForCausalLM.from_pretrained(checkpoints / "hf", sliding_window=5)
    for key in ("forward", "prefill"):
        torch.testing.assert_close(results_of(model)[key], results_of(plain)[key])
    assert not any(weight.requires_grad for weight in model.parameters())
    with pytest.raises(NotImplementedError, match=r"^save_pretrained is not supported on a rank"):
        model.save_pretrained(checkpoints / "new")


@pytest.mark.slow
def test_collectives_stay_in_a_compiled_graph(checkpoints: Path, group: None) -> None:
    model = ParallelMistralForCausalLM.from_pretrained(checkpoints / "hf")
    block, x = model.model.layers[0].mlp, torch.randn(3, CONFIG.hidden_size)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), block(x))
    compiled = torch.compile(model.lm_head, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), model.lm_head(x))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("save", [save_hf, save_raw])
def test_no_rank_loads_the_whole_model(save: Any, tmp_path: Path) -> None:
    """The peak memory of loading is less than 110 % of the rank's share."""
    config = CONFIGS["1.2B"]
    tensors = random_tensors(config, torch.bfloat16)
    save(tensors, config, tmp_path / "m", dtype=torch.bfloat16)
    for size in (2, 4):
        ended = finish(start(size, TESTS / "support" / "parallel_memory.py", tmp_path / "m"), 200)
        assert all(each.code == 0 for each in ended), ended
        for each in ended:
            share, peak = map(int, each.out.split())
            assert share <= peak <= 1.1 * share, (size, share, peak)


# Models of memory and time


def test_memory_of_7b() -> None:
    config = MistralConfig()
    # 7 241 732 096 parameters; every rank holds the 65 norms of 4096 elements.
    norms = 65 * 4096
    for size in (1, 2, 4, 8):
        held = memory_per_rank(config, size)
        assert held.weights == 2 * ((7_241_732_096 - norms) // size + norms)
        assert held.cache == 32 * 2 * 4096 * 1024 * 2 // size
    # With 8 key/value heads, each is on 2 of 16 ranks.
    more = memory_per_rank(config, 16, dtype=torch.float32, batch=3, max_length=100)
    assert more.cache == 3 * 32 * 2 * 100 * 128 * 4
    kv_and_others = (7_241_732_096 - norms - 32 * 2 * 1024 * 4096) // 16 + 32 * 2 * 128 * 4096
    assert more.weights == 4 * (kv_and_others + norms)


def test_the_readme_has_the_models_table() -> None:
    readme = (TESTS.parent / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(parallel_model.table()) in readme


# Interrupts, signals and torchrun


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks() -> None:
    arguments = ("-m", "mistral_kernels.generate", *GREEDY[:-1], "1000000", "--ignore-eos")
    processes = start(2, *arguments)
    assert processes[0].stdout is not None
    head = processes[0].stdout.read(20)
    for process in processes:
        process.send_signal(signal.SIGINT)
    main, other = finish(processes, 60)
    assert len(head) == 20, (main, other)
    assert main.code == other.code == 130, (main, other)
    # PyTorch warns if a collective was interrupted.
    warning = r"\[W.*? ProcessGroup\.cpp:\d+\] Warning: .*?\(function ~WorkRegistry\)\n"
    main_err, other_err = (re.sub(warning, "", x.err, flags=re.DOTALL) for x in (main, other))
    assert main_err.endswith("\ninterrupted\n")
    assert "Traceback" not in main_err
    assert "on rank 0 of 2" in main_err
    assert (other.out, other_err) == ("", "")


@pytest.mark.slow
def test_killing_a_rank_ends_the_others() -> None:
    arguments = ("-m", "mistral_kernels.generate", *GREEDY[:-1], "1000000", "--ignore-eos")
    processes = start(2, *arguments)
    assert processes[0].stdout is not None
    assert processes[0].stdout.read(20)
    processes[1].kill()
    main, other = finish(processes, 60)
    assert other.code == -signal.SIGKILL
    assert main.code == 2
    assert main.err.endswith("error: rank 0: another rank ended; see its error message\n")


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.Popen[str]:
    command = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return subprocess.Popen(
        [sys.executable, *command, "-m", "mistral_kernels.generate", *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_torchrun() -> None:
    """Under torchrun, rank 0 reads stdin and is the only rank that writes to stdout."""
    model = MistralForCausalLM.from_pretrained("tiny", dtype=torch.float32)
    tokenizer = MistralTokenizer.from_pretrained("tiny")
    (expected,) = generate(model, tokenizer, ["She was"], max_tokens=20)
    process = torchrun("-", *GREEDY[1:])
    out, err = process.communicate("She was", timeout=100)
    assert (process.returncode, out) == (0, expected.text + "\n"), err


@pytest.mark.slow
def test_ctrl_c_under_torchrun() -> None:
    """Send SIGINT to the whole process group, as a terminal does, including torchrun's agent."""
    process = torchrun(*GREEDY[:-1], "1000000", "--ignore-eos")
    assert process.stdout is not None
    head = process.stdout.read(20)
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    (ended,) = finish([process], 100)
    assert len(head) == 20
    assert ended.code != 0
    assert time.monotonic() - started < 60
    assert ended.err.count("\ninterrupted\n") == 1, ended.err
    assert "mistral_kernels" not in ended.err.partition("Traceback")[2], ended.err
