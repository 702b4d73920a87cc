"""Random sequences of appends, steps, resets and reorders, compared with a growing cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.small_checkpoints import SMALL
from torch import Tensor

from mistral_kernels import RollingCache, rolling_cache_attention, rolling_cache_update_
from mistral_kernels.ops import reference
from mistral_kernels.ops.rotary import rotary_tables

BATCH, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
WINDOWS = (5, 2, None)  # of the three layers; the last layer's ring must hold all tokens
LENGTH = 60


class CacheMachine(RuleBasedStateMachine):
    device: torch.device

    @initialize(endless=st.booleans())
    def begin(self, endless: bool) -> None:
        windows = WINDOWS[:2] + WINDOWS[:1] if endless else WINDOWS
        config = dataclasses.replace(SMALL, sliding_window=windows)
        self.windows = windows
        self.cache = RollingCache(config, BATCH, LENGTH, torch.float32, self.device)
        self.tables = rotary_tables(LENGTH, HEAD_DIM, 1e4, self.device)
        self.texts = self.no_texts()

    def no_texts(self) -> list[list[tuple[Tensor, Tensor]]]:
        empty = torch.empty(0, KV_HEADS, HEAD_DIM, device=self.device)
        return [[(empty, empty)] * BATCH for _ in self.windows]

    def room(self) -> int:
        return LENGTH - max(self.cache.host_lengths)

    def tokens(self, total: int) -> list[Tensor]:
        shapes = [(total, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS)]
        return [torch.randn(shape, device=self.device) for shape in shapes]

    def grow(self, layer: int, q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
        """Append the tokens to the growing cache, and return their attention over all tokens."""
        outs, window = [], self.windows[layer]
        for i, new in enumerate(zip(*(x.split(counts) for x in (q, k, v)), strict=True)):
            keys, values = (
                torch.cat(pair) for pair in zip(self.texts[layer][i], new[1:], strict=True)
            )
            self.texts[layer][i] = keys, values
            out, _ = reference.attention(
                *(x.double()[None] for x in (new[0], keys, values)),
                causal=True,
                window_size=(-1 if window is None else window - 1, 0),
            )
            outs.append(out[0].float())
        return torch.cat(outs)

    @rule(counts=st.lists(st.integers(0, 13), min_size=BATCH, max_size=BATCH))
    def append(self, counts: list[int]) -> None:
        """Append chunks of any lengths, also above the capacity: attention, then the update."""
        counts = [min(n, self.room()) for n in counts]
        packing = self.cache.packing(counts)
        for layer in range(len(self.windows)):
            q, k, v = self.tokens(sum(counts))
            expected = self.grow(layer, q, k, v, counts)
            ring = self.ring(layer, packing.cu_seqlens, max(counts))
            out = rolling_cache_attention(
                q, k, v, **ring, sliding_window=self.windows[layer], counters=self.cache.counters
            )
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            rolling_cache_update_(**ring, k=k, v=v)
        self.cache.advance(packing)

    @rule(rotary=st.booleans())
    def step(self, rotary: bool) -> None:
        """Append one token per sequence: the update, with or without rotation, then attention."""
        if self.room() == 0:
            return
        packing = self.cache.packing([1] * BATCH)
        for layer, window in enumerate(self.windows):
            q, k, v = self.tokens(BATCH)
            ring = self.ring(layer, packing.cu_seqlens, 1)
            if rotary:
                positions = self.cache.lengths
                rotated = reference.apply_rotary(q, k, *self.tables, positions)
                expected = self.grow(layer, *rotated, v, [1] * BATCH)
                options = {"q": q, "cos": self.tables[0], "sin": self.tables[1]}
                q = rolling_cache_update_(**ring, k=k, v=v, **options)
            else:
                expected = self.grow(layer, q, k, v, [1] * BATCH)
                rolling_cache_update_(**ring, k=k, v=v)
            out = rolling_cache_attention(
                q, None, None, **ring, sliding_window=window, counters=self.cache.counters
            )
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        self.cache.advance(packing)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.texts = self.no_texts()

    @rule(order=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, order: list[int]) -> None:
        self.cache.reorder(order)
        self.texts = [[layer[i] for i in order] for layer in self.texts]

    def ring(self, layer: int, cu_seqlens: Tensor, max_seqlen: int) -> dict[str, object]:
        return {
            "k_cache": self.cache.keys[layer],
            "v_cache": self.cache.values[layer],
            "lengths": self.cache.lengths,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
        }

    @invariant()
    def slots_hold_the_newest_keys(self) -> None:
        """Check that each slot holds the newest key of its positions, in rings of constant size."""
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths.tolist() == self.cache.host_lengths
        assert not self.cache.counters.any()
        for layer, window in enumerate(self.windows):
            for i, (keys, _) in enumerate(self.texts[layer]):
                ring = self.cache.keys[layer][i]
                assert len(ring) == min(window or LENGTH, LENGTH)
                assert len(keys) == self.cache.host_lengths[i]
                held = range(max(0, len(keys) - len(ring)), len(keys))
                slots = ring[[p % len(ring) for p in held]]
                torch.testing.assert_close(slots, keys[held.start :], rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
def test_any_sequence_of_operations(backend: str, device: torch.device) -> None:
    examples = 25 if backend == "torch" else 6
    CacheMachine.device = device
    CacheMachine.TestCase.settings = settings(max_examples=examples, stateful_step_count=12)
    CacheMachine.TestCase("runTest").runTest()
