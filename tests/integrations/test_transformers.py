"""attn_implementation="mistral_kernels" against eager attention, with and without caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import assert_as_accurate
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.transformers_cases import (  # noqa: E402
    CACHE,
    MODELS,
    OLD_MASKS,
    PADDING,
    VOCAB,
    W,
    assert_close,
    batch,
    both,
    both_logits,
    check_gradients,
    gradients,
    make_model,
    new_cache,
    packed_positions,
    positions_of,
)

from mistral_kernels.integrations import transformers_attention  # noqa: E402
from mistral_kernels.integrations.transformers import register  # noqa: E402


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    register()  # a second call does nothing


@pytest.fixture
def no_full_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a query-by-key mask is used for more than one query."""
    attend = transformers_attention._attend_with_full_mask

    def attend_one(module: Any, query: Tensor, *args: Any) -> Tensor:
        assert query.shape[2] == 1, "a full mask was created"
        return attend(module, query, *args)

    monkeypatch.setattr(transformers_attention, "_attend_with_full_mask", attend_one)


# One forward pass without a cache


@pytest.mark.usefixtures("no_full_mask")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits(name: str, padding: str) -> None:
    model = make_model(name)
    for seqlen in (1, 2, W - 1, W, W + 1, 3 * W + 5):
        ids, attention_mask = batch(seqlen, padding)
        real = attention_mask.bool()
        given = {"attention_mask": attention_mask, "position_ids": positions_of(attention_mask)}
        for use_cache in (True, False):
            ours, eager = both_logits(model, ids, **given, use_cache=use_cache)
            assert torch.isfinite(ours).all()
            assert_close(ours[real], eager[real])
    if padding == "none":
        ours, eager = both_logits(model, ids)
        assert_close(ours, eager)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@torch.no_grad()
def test_full_masks(name: str) -> None:
    """Test masks with holes and 4-D masks, bool and float with any bias, also with a softcap."""
    model = make_model(name)
    seqlen = 2 * W + 3
    ids, attention_mask = batch(seqlen, "left")
    attention_mask[:, W] = 0
    attention_mask[1, 3] = 0
    visible = torch.rand(3, 1, seqlen, seqlen) < 0.7
    visible |= torch.eye(seqlen, dtype=torch.bool)
    bias = torch.randn(3, 1, seqlen, seqlen)
    real = attention_mask.bool()
    ours, eager = both_logits(model, ids, attention_mask=attention_mask)
    assert_close(ours[real], eager[real])
    for full in (torch.zeros_like(bias).masked_fill(~visible, -torch.inf), bias):
        ours, eager = both_logits(model, ids, attention_mask=full)
        assert_close(ours, eager)
        if full is not bias:
            model.set_attn_implementation("mistral_kernels")
            assert_close(model(ids, attention_mask=visible).logits, eager)


@pytest.mark.usefixtures("no_full_mask")
@torch.no_grad()
def test_a_row_with_only_padding() -> None:
    model = make_model()
    ids, attention_mask = batch(2 * W, "left")
    attention_mask[0] = 0
    for given in ({}, {"use_cache": False}):
        ours, eager = both_logits(model, ids, attention_mask=attention_mask, **given)
        real = attention_mask.bool()
        assert torch.isfinite(ours).all()
        assert_close(ours[real], eager[real])


@pytest.mark.usefixtures("no_full_mask")
@pytest.mark.parametrize("case", [*PADDING, "packed", "packed rows"])
@pytest.mark.parametrize("name", ["mistral", "no window", "gemma2", "checkpointing"])
def test_gradients(name: str, case: str) -> None:
    check_gradients(name, case, torch.device("cpu"))


@pytest.mark.usefixtures("no_full_mask")
@pytest.mark.parametrize("kind", ["no", "dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "llama", "gemma2"])
@torch.no_grad()
def test_packed_by_position_ids(name: str, kind: str) -> None:
    """Pack short and long prompts over every cache, with a mask of ones and without a mask."""
    model = make_model(name)
    for lengths in ((4, 7), (5, 1, 2 * W, W - 3)):
        seqlen = sum(lengths)
        ids = torch.randint(1, VOCAB, (2, seqlen))
        positions = packed_positions(lengths)
        model.set_attn_implementation("eager")
        parts = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
        model.set_attn_implementation("mistral_kernels")
        for rows in (1, 2):
            for given in ({}, {"attention_mask": torch.ones(rows, seqlen)}):
                if kind == "no":
                    given["use_cache"] = False
                else:
                    given[CACHE] = new_cache(kind, model, seqlen + 3)
                logits = model(ids[:rows], position_ids=positions, **given).logits
                assert_close(logits, torch.cat(parts, 1)[:rows])


@torch.no_grad()
def test_position_ids_that_do_not_pack() -> None:
    """Test gaps in the positions, positions that restart in a later chunk, and padded rows."""
    model = make_model()
    ids, attention_mask = batch(3 * W, "left")
    gap = torch.arange(3 * W)[None] + 5
    gap[:, W:] += 3
    for given in (
        {"position_ids": gap},
        {"position_ids": torch.arange(3 * W)[None] % W, "attention_mask": attention_mask},
    ):
        real = attention_mask.bool() if "attention_mask" in given else slice(None)
        ours, eager = both_logits(model, ids, **given)
        assert_close(ours[real], eager[real])

    def in_chunks() -> Tensor:
        cache = new_cache("dynamic", model, 3 * W)
        chunks = [
            model(ids[:, i : i + W], position_ids=torch.arange(W)[None], **{CACHE: cache}).logits
            for i in range(0, 3 * W, W)
        ]
        return torch.cat(chunks, 1)

    assert_close(*both(model, in_chunks))


@pytest.mark.usefixtures("no_full_mask")
@pytest.mark.parametrize("pass_positions", [False, True])
def test_cu_seqlens_of_the_collator(pass_positions: bool) -> None:
    """Pass transformers' keywords for packed batches, with and without position_ids."""
    model = make_model().train()
    lengths = (3, 1, 2 * W, W - 3)
    ids, real = torch.randint(1, VOCAB, (1, sum(lengths))), torch.ones(1, sum(lengths)) > 0
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cu_seqlens = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    longest = {"max_length_q": 2 * W, "max_length_k": 2 * W}
    positions = {"position_ids": packed_positions(lengths)}
    model.set_attn_implementation("eager")
    eager = gradients(model, ids, real, positions)
    model.set_attn_implementation("mistral_kernels")
    given = {**cu_seqlens, **longest, **(positions if pass_positions else {})}
    ours = gradients(model, ids, real, given)
    for key in eager:
        assert_close(ours[key], eager[key], 1e-4)


@torch.no_grad()
def test_bfloat16() -> None:
    model = make_model()
    ids, attention_mask = batch(3 * W, "left")
    real = attention_mask.bool()
    model.set_attn_implementation("eager")
    model.double()
    exact = torch.cat(
        [model(row[shown][None]).logits[0] for row, shown in zip(ids, real, strict=True)]
    )
    model.bfloat16()
    ours, eager = both_logits(model, ids, attention_mask=attention_mask)
    assert_as_accurate(ours[real], eager[real], exact, "logits")
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = both_logits(model, ids, attention_mask=attention_mask)
    assert_as_accurate(ours[real], eager[real], exact, "logits under autocast")


# Caches


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_step_over_a_cache(name: str, kind: str, padding: str) -> None:
    """Compare a prompt and single tokens, within the window and past it, with one pass."""
    model = make_model(name)
    total = 4 * W
    ids, attention_mask = batch(total, padding)
    positions = positions_of(attention_mask)
    model.set_attn_implementation("eager")
    real = attention_mask.bool()
    expected = model(ids, attention_mask=attention_mask, position_ids=positions).logits
    model.set_attn_implementation("mistral_kernels")
    for prompt in (W - 3, 2 * W + 1):
        cache = new_cache(kind, model, total + 3)
        begin = 0
        for end in (prompt, *range(prompt + 1, total + 1)):
            given = {"position_ids": positions[:, begin:end]}
            if padding != "none":
                given["attention_mask"] = attention_mask[:, :end]
            if OLD_MASKS:
                given["cache_position"] = torch.arange(begin, end)
            logits = model(ids[:, begin:end], **{CACHE: cache}, **given).logits
            shown = real[:, begin:end]
            assert torch.isfinite(logits).all()
            assert_close(logits[shown], expected[:, begin:end][shown])
            begin = end


@pytest.mark.usefixtures("no_full_mask")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_over_a_cache(name: str) -> None:
    """Test padded chunks of few and of many queries, within the window and across it."""
    model = make_model(name)
    sizes = (2, 5, 20, 1, 17, 3)
    total = sum(sizes)
    ids, attention_mask = batch(total, "left")
    positions = positions_of(attention_mask)
    real = attention_mask.bool()
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=attention_mask, position_ids=positions).logits
    model.set_attn_implementation("mistral_kernels")
    cache = new_cache("dynamic", model, total)
    begin = 0
    for size in sizes:
        end = begin + size
        given = {"attention_mask": attention_mask[:, :end], "position_ids": positions[:, begin:end]}
        logits = model(ids[:, begin:end], **{CACHE: cache}, **given).logits
        shown = real[:, begin:end]
        assert_close(logits[shown], expected[:, begin:end][shown])
        begin = end


MODES: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "llama", "gemma2"])
def test_generate(name: str, kind: str, padding: str, mode: str) -> None:
    """Generate padded texts within the window and past it; static caches are not full."""
    model = make_model(name).double()
    for seqlen, new in ((3, 4), (5, 2 * W), (2 * W + 5, 6)):
        ids, attention_mask = batch(seqlen, padding)
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, **MODES[mode]}
        if kind == "static":
            options["cache_implementation"] = "static"
        given = {"attention_mask": attention_mask, "pad_token_id": 0}
        ours, eager = both(model, model.generate, ids, **given, **options)
        assert torch.equal(ours, eager)
        assert ours.shape[1] == seqlen + new


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("draft", ["assistant", "lookup"])
@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_assisted_generation(name: str, draft: str) -> None:
    if OLD_MASKS and name == "mistral":
        pytest.skip("this transformers cannot drop tokens of a sliding cache")
    model = make_model(name).double()
    assistant = make_model(name, num_hidden_layers=1).double()
    ids = torch.randint(1, VOCAB, (1, 4)).repeat(1, 3)
    options: dict[str, Any] = {"assistant_model": assistant}
    if draft == "lookup":
        options = {"prompt_lookup_num_tokens": 3}

    def run() -> Tensor:
        assistant.set_attn_implementation(model.config._attn_implementation)
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, **options}
        return model.generate(
            ids, max_new_tokens=2 * W, do_sample=False, eos_token_id=VOCAB - 1, **given
        )

    ours, eager = both(model, run)
    assert torch.equal(ours, eager)
