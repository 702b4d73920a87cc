"""The rolling cache: its size, slots and limits, and dropping, selecting and reordering."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from support.small_checkpoints import SMALL

from mistral_kernels import MistralConfig, MistralForCausalLM, RollingCache
from mistral_kernels.model.cache import Packing

W = 7
CPU = torch.device("cpu")


def make_model(**changes: object) -> MistralForCausalLM:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    return MistralForCausalLM(config).eval()


def random_ids(n: int) -> list[int]:
    return torch.randint(SMALL.vocab_size, (n,)).tolist()


def empty_cache(config: MistralConfig = SMALL, batch: int = 2, length: int = 64) -> RollingCache:
    return RollingCache(config, batch, length, torch.float32)


@pytest.mark.parametrize(
    ("window", "max_length", "capacities"),
    [(W, 64, [7, 7, 7]), (W, 5, [5, 5, 5]), (None, 33, [33] * 3), ((W, None), 20, [7, 20, 7])],
)
def test_capacity_of_each_layer(
    window: int | tuple[int | None, ...] | None, max_length: int, capacities: list[int]
) -> None:
    config = dataclasses.replace(SMALL, sliding_window=window)
    cache = RollingCache(config, 3, max_length, torch.bfloat16)
    shapes = [(3, capacity, 2, 16) for capacity in capacities]
    assert [tuple(k.shape) for k in cache.keys] == [tuple(v.shape) for v in cache.values] == shapes
    assert cache.nbytes == 2 * sum(capacities) * 3 * 2 * 16 * 2
    assert cache.batch == 3
    assert cache.lengths.tolist() == cache.host_lengths == [0, 0, 0]
    assert cache.endless == (window == W and max_length >= W)


@torch.inference_mode()
def test_rings_are_neither_resized_nor_moved_as_the_text_grows() -> None:
    model = make_model()
    cache = model.new_cache(1, W)
    size, addresses = cache.nbytes, [ring.data_ptr() for ring in (*cache.keys, *cache.values)]
    model.prefill([random_ids(50)], cache, 13)
    for _ in range(30):
        model.decode(torch.tensor([5]), cache)
    assert cache.host_lengths == cache.lengths.tolist() == [80]
    assert cache.nbytes == size == 2 * 3 * W * 2 * 16 * 4
    assert [ring.data_ptr() for ring in (*cache.keys, *cache.values)] == addresses


@torch.inference_mode()
def test_the_token_at_position_p_is_in_slot_p_modulo_capacity() -> None:
    """Check only the first layer: its keys and values depend only on their own token."""
    model, ids = make_model(), random_ids(40)
    for length in (1, W - 1, W, W + 1, 2 * W, 40):
        cache = model.new_cache(1, 40)
        model.prefill([ids[:length]], cache, random.randint(1, 12))
        for position in range(max(0, length - W), length):
            single = model.new_cache(1, 40)
            single.lengths.fill_(position)
            single.host_lengths = [position]
            model.decode(torch.tensor([ids[position]]), single)
            slot = position % W
            for rings, others in ((cache.keys, single.keys), (cache.values, single.values)):
                torch.testing.assert_close(rings[0][0, slot], others[0][0, slot])


def test_packing_continues_the_positions_of_each_sequence() -> None:
    cache = empty_cache(batch=3)
    cache.advance(cache.packing([4, 0, 2]))
    assert cache.host_lengths == cache.lengths.tolist() == [4, 0, 2]
    packing = cache.packing([2, 1, 3])
    assert packing.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.positions.tolist() == [4, 5, 0, 2, 3, 4]
    assert packing.last_tokens.tolist() == [1, 2, 5]
    assert (packing.seqlens, packing.end, packing.max_seqlen) == ((2, 1, 3), 6, 3)
    assert not packing.rectangular
    assert Packing.of([3, 3], [0, 5], CPU).rectangular
    assert cache.host_lengths == [4, 0, 2], "packing() must not change the lengths"
    cache.advance(packing)
    assert cache.host_lengths == cache.lengths.tolist() == [6, 1, 5]


def test_tokens_that_do_not_fit_are_rejected() -> None:
    with pytest.raises(ValueError, match="number of sequences must be 2, got 3"):
        empty_cache().packing([1, 1, 1])
    full = dataclasses.replace(SMALL, sliding_window=(W, None))
    cache = empty_cache(full, length=10)
    cache.advance(cache.packing([10, 3]))
    message = "sequence length must be <= 10, the max_length of the cache, got 11"
    with pytest.raises(ValueError, match=message):
        cache.packing([1, 1])
    cache.packing([0, 7])
    # Rings smaller than the window would overwrite keys that are still in the window.
    with pytest.raises(ValueError, match="sequence length must be <= 5, the max_length of the"):
        empty_cache(length=W - 2).packing([1, W - 1])
    assert empty_cache(length=W).packing([1, 10**6]).end == 10**6


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (-1, 5), (2, -3)])
def test_sizes_that_are_not_positive_are_rejected(batch: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"must be positive, got {batch} and {length}"):
        empty_cache(batch=batch, length=length)


@pytest.mark.parametrize("window", [W, None, (None, W)])
@torch.inference_mode()
def test_dropped_tokens_do_not_change_later_logits(
    window: int | tuple[int | None, ...] | None,
) -> None:
    """Any number of tokens can be dropped before a ring wraps, and one token afterwards."""
    model = make_model(sliding_window=window)
    for lengths, count in (((6, W), 0), ((6, W), 1), ((6, W), 6), ((W + 5, 3 * W), 1)):
        first, second = [random_ids(n) for n in lengths], [random_ids(9), random_ids(1)]
        cache = model.new_cache(2, 64)
        model.prefill(first, cache)
        cache.drop(count)
        kept = [n - count for n in lengths]
        assert cache.host_lengths == cache.lengths.tolist() == kept
        actual = model.prefill(second, cache)
        whole = [a[:n] + b for a, n, b in zip(first, kept, second, strict=True)]
        expected = model.prefill(whole, model.new_cache(2, 64))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_drops_that_need_overwritten_keys_are_rejected() -> None:
    """Drop two tokens at once, and one token twice."""
    cache = empty_cache()
    cache.advance(cache.packing([W, 3]))
    with pytest.raises(ValueError, match=r"count must be .*, got 4 for sequences of .7, 3. tokens"):
        cache.drop(4)
    with pytest.raises(ValueError, match=r"count must be at least 0, .*, got -1 for"):
        cache.drop(-1)
    cache.drop(2)
    cache.advance(cache.packing([2, 1]))
    cache.drop(2)
    cache.advance(cache.packing([3, 2]))
    lengths = [W + 1, 2]
    assert cache.host_lengths == lengths
    with pytest.raises(ValueError, match=r"count must be .*, got 2 for .* in rings of 7 slots"):
        cache.drop(2)
    assert cache.host_lengths == cache.lengths.tolist() == lengths, (
        "a rejected drop must not change the lengths"
    )
    cache.drop()
    for same in (cache, cache.select([0, 1])):
        same.drop(0)
        with pytest.raises(ValueError, match=r"count must be .*, got 1 for .* of .7, 1. tokens"):
            same.drop()
    cache.reorder([1, 1])
    cache.drop()
    cache.reset()
    cache.advance(cache.packing([W, W]))
    cache.drop(W)


@torch.inference_mode()
def test_select_copies_sequences() -> None:
    model = make_model(sliding_window=(W, None, W))
    prompts = [random_ids(5), random_ids(W + 6)]
    cache = model.new_cache(2, 32)
    model.prefill(prompts, cache)
    chosen = cache.select([1, 0, 1])
    assert chosen.host_lengths == chosen.lengths.tolist() == [W + 6, 5, W + 6]
    three, two = (model.decode(torch.tensor([3] * c.batch), c) for c in (chosen, cache))
    torch.testing.assert_close(three, two[[1, 0, 1]], rtol=1e-5, atol=1e-5)


def test_a_cache_is_unusable_after_an_interrupted_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    cache = model.new_cache(1, 32)
    model.prefill([[1, 2, 3]], cache)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.layers[-1].mlp, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.prefill([[4]], cache)
    with pytest.raises(ValueError, match="the cache is incomplete because a forward pass was"):
        model.decode(torch.tensor([5]), cache)


def test_reset_and_reorder() -> None:
    """A reset cache equals a new one, and a reordered cache equals its sequences' own caches."""
    model = make_model()
    prompts = [random_ids(5), random_ids(W + 6)]
    cache, fresh = model.new_cache(2, 64), model.new_cache(2, 64)
    with torch.inference_mode():
        first = model.prefill(prompts, cache)
        cache.reorder([1, 1])
        assert cache.host_lengths == cache.lengths.tolist() == [W + 6] * 2
        both = model.decode(torch.tensor([3, 3]), cache)
        model.prefill(prompts, fresh)
        alone = model.decode(torch.tensor([3, 3]), fresh)
        torch.testing.assert_close(both, alone[[1, 1]], rtol=1e-5, atol=1e-5)
        cache.interrupted = True
        cache.reset()
        torch.testing.assert_close(model.prefill(prompts, cache), first)


@pytest.mark.parametrize("sequences", [[0], [0, 1, 1], [0, 2], [-1, 0]])
def test_reorder_rejects_wrong_indices(sequences: list[int]) -> None:
    cache = empty_cache()
    with pytest.raises(ValueError, match=r"sequences must be 2 indices in \[0, 2\), got "):
        cache.reorder(sequences)


@pytest.mark.parametrize(
    ("changes", "dtype", "device", "message"),
    [
        (
            {"sliding_window": 8},
            torch.float32,
            "cpu",
            r"layout of the model, .* got .*=\(8, 8, 8\)",
        ),
        ({"num_key_value_heads": 4}, torch.float32, "cpu", "got .*num_key_value_heads=4"),
        ({"head_dim": 8}, torch.float32, "cpu", "got .*head_dim=8"),
        ({"num_hidden_layers": 2}, torch.float32, "cpu", r"got .*layer_windows=\(7, 7\)"),
        ({}, torch.bfloat16, "cpu", "must be torch.float32 on cpu like the model, got torch.bf"),
        ({}, torch.float32, "meta", "must be torch.float32 on cpu like the model, .* on meta"),
    ],
    ids=str,
)
def test_a_cache_of_another_model_is_rejected_and_unchanged(
    changes: dict[str, int], dtype: torch.dtype, device: str, message: str
) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    cache = RollingCache(config, 1, 64, dtype, device)
    with pytest.raises(ValueError, match=message):
        make_model().prefill([random_ids(3)], cache)
    assert cache.host_lengths == [0]
    assert not cache.interrupted
    assert cache.keys[0].is_meta or not any(ring.any() for ring in cache.keys)
