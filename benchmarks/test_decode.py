"""The decode step on the CPU: writing to the rolling cache, and tokens a second far into a text.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_decode.py

The cache update has csrc's operator, alone and behind `rolling_cache_update_`, beside
`index_copy_` into the same caches at slots known beforehand; with rotary embedding, beside
`apply_rotary` and then `index_copy_` (unfused). The step has a random model with a
window of 256 tokens, at twice that position and at 20,000, beside transformers' caches, if
transformers is there. Nothing is timed before both sides agree.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_kernels import MistralForCausalLM
from mistral_kernels.ops import extension
from mistral_kernels.ops.rolling_cache import rolling_cache_update_
from mistral_kernels.ops.rotary import apply_rotary, rotary_tables

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Pair, Report  # noqa: E402  # beside this file, which is no package
from make_checkpoint import CONFIGS, random_tensors  # noqa: E402

try:
    import transformers
except ImportError:
    transformers = None

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 32, 8, 128, 4096
UPDATES = 1000  # in one round: milliseconds of a round are microseconds of an update
SHAPES = {"1-token": (1, 1), "8x1-tokens": (8, 1), "512-tokens": (1, 512)}  # batch, new tokens


@pytest.fixture
def operator() -> Any:
    library = extension.load("cpu")
    if library is None:
        pytest.skip(extension.status("cpu"))
    return library.rolling_cache_update


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotary", [False, True], ids=["update", "rotary-update"])
@pytest.mark.parametrize("ours", ["csrc", "public"])
@torch.inference_mode()
def test_cache_update(ours: str, rotary: bool, shape: str, operator: Any, against: Pair) -> None:
    """bfloat16, 8 kv heads of 128, rings of 4096 slots; chunks wrap round."""
    batch, count = SHAPES[shape]
    k_cache, v_cache = torch.zeros(2, batch, CAPACITY, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    q, k, v = (
        torch.randn(batch * count, HEADS + 2 * KV_HEADS, HEAD_DIM)
        .bfloat16()
        .split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    )
    lengths = torch.randint(2 * CAPACITY - count // 2 - 1, 2 * CAPACITY, (batch,)).int()
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * count
    new = k, v, lengths, cu_seqlens, count
    cos, sin = rotary_tables(3 * CAPACITY, HEAD_DIM, 10_000.0)
    q_out = torch.empty(q.shape, dtype=q.dtype)
    positions = (lengths[:, None] + torch.arange(count)).flatten()
    rows = torch.arange(batch).repeat_interleave(count)
    slots = rows * CAPACITY + positions % CAPACITY

    def csrc(k_cache: Tensor, v_cache: Tensor) -> Tensor:
        turn = (q, q_out, cos, sin, False) if rotary else (None, None, None, None, False)
        operator(k_cache, v_cache, *new, None, None, *turn)
        return q_out

    def public(k_cache: Tensor, v_cache: Tensor) -> Tensor | None:
        turn = {"q": q, "cos": cos, "sin": sin} if rotary else {}
        return rolling_cache_update_(k_cache, v_cache, *new, **turn)

    def index_copy(flat_k: Tensor, flat_v: Tensor) -> Tensor:
        turned_q, turned_k = apply_rotary(q, k, cos, sin, positions) if rotary else (q, k)
        flat_k.index_copy_(0, slots, turned_k)
        flat_v.index_copy_(0, slots, v)
        return turned_q

    def often(call: Callable[..., object], *caches: Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(UPDATES):
                call(*caches)

        return run

    update = {"csrc": csrc, "public": public}[ours]
    other_k, other_v = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
    flat = other_k.flatten(0, 1), other_v.flatten(0, 1)
    mine, theirs = update(k_cache, v_cache), index_copy(*flat)
    assert torch.equal(k_cache, other_k) and torch.equal(v_cache, other_v), "the caches differ"
    assert k_cache.any(-1).sum() == batch * count * KV_HEADS
    assert not rotary or torch.equal(mine, theirs), "the turned queries differ"
    against(
        "unfused" if rotary else "index_copy_",
        often(update, k_cache, v_cache),
        often(index_copy, *flat),
        rounds=5 if count > 1 else 25,
    )


CONFIG = CONFIGS["10M"]
NEAR, FAR = 2 * CONFIG.sliding_window, 20_000
CHUNK = 512
STEPS, ROUNDS = 16, 41  # decode steps in a round, and rounds
Step = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def steps(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, int], Step]]:
    """By name and position: what decodes the next token (1,), logits (1, vocab_size)."""
    dtype = getattr(torch, request.param)
    weights = dict(random_tensors(CONFIG, dtype))
    ids = torch.randint(CONFIG.vocab_size, (1, FAR))
    model = MistralForCausalLM(CONFIG).to(dtype).eval()
    model.load_state_dict(weights)

    def ours(position: int) -> Step:
        cache = model.new_cache(1, CONFIG.sliding_window)
        model.prefill(ids[:, :position].tolist(), cache)
        return lambda token: model.decode(token, cache)

    def theirs(past: Any, position: int) -> Step:
        for chunk in ids[:, :position].split(CHUNK, dim=1):
            other(chunk, past_key_values=past, use_cache=True, logits_to_keep=1)
        return lambda token: other(token[None], past_key_values=past, use_cache=True).logits[:, -1]

    with torch.inference_mode():
        found = {("ours", position): ours(position) for position in (NEAR, FAR)}
        if transformers is not None:
            fields = CONFIG.to_hf(request.param)
            other = transformers.MistralForCausalLM(
                transformers.MistralConfig(**fields, attn_implementation="sdpa")
            )
            other = other.to(dtype).eval()
            other.load_state_dict(weights)
            room = FAR + STEPS * (ROUNDS + 2)
            for position in (NEAR, FAR):
                dynamic = transformers.DynamicCache(config=other.config)
                static = transformers.StaticCache(config=other.config, max_cache_len=room)
                found["DynamicCache", position] = theirs(dynamic, position)
                found["StaticCache", position] = theirs(static, position)
        token = ids[0, :1]
        logits = {key: step(token).float() for key, step in found.items()}
        for (name, position), x in logits.items():
            mine = logits["ours", position]
            difference = (x - mine).norm() / mine.norm()
            # transformers forms its angles in float32, which shows at large positions.
            limit = 1e-3 if dtype == torch.float32 else 0.1
            assert difference < limit, f"{name}'s logits differ at {position}: {difference}"
        yield found


@torch.inference_mode()
def test_tokens_per_second(
    steps: dict[tuple[str, int], Step], request: pytest.FixtureRequest, report: Report
) -> None:
    """What is far into a text costs no more: the ratio that counts is that of the positions."""
    token = torch.randint(CONFIG.vocab_size, (1,))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    order = list(steps)
    for turn in range(ROUNDS + 1):
        random.shuffle(order)  # so that no call always follows the same one
        for key in order:
            start = time.perf_counter()
            for _ in range(STEPS):
                steps[key](token)
            if turn:  # the first round warms up
                times[key].append(time.perf_counter() - start)
    dtype = request.node.callspec.params["steps"]
    title = f"tokens a second, window {CONFIG.sliding_window}, medians of {ROUNDS} rounds"
    columns = f"{f'at {NEAR}':>12}{f'at {FAR}':>12}{'ratio':>10}"
    report(title, f"{'dtype':12}{'cache':16}{columns}")
    for name in dict.fromkeys(name for name, _ in times):
        near, far = times[name, NEAR], times[name, FAR]
        rates = "".join(f"{STEPS / statistics.median(x):12.1f}" for x in (near, far))
        ratio = statistics.median(a / b for a, b in zip(near, far))
        report(title, f"{dtype:12}{name:16}{rates}{ratio:10.3f}")
