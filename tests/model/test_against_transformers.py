"""Comparison of the model with transformers' MistralForCausalLM, with the same random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.helpers import assert_same_text
from support.transformers_pair import HEADS, VOCAB, make_pair, relative_error

from mistral_kernels import MistralForCausalLM


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("heads", HEADS)
@torch.inference_mode()
def test_logits_equal_transformers(heads: str, window: int | None, seqlen: int) -> None:
    tied = heads == "8/8x64"
    ours, theirs = make_pair(heads, sliding_window=window, tie_word_embeddings=tied)
    ids = torch.randint(VOCAB, (2, seqlen))
    exact = theirs(ids).logits
    assert relative_error(ours(ids).logits, exact) < 1e-4

    narrow, narrow_theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    error, allowed = (relative_error(f(ids).logits, exact) for f in (narrow, narrow_theirs))
    assert error <= 2 * allowed


@pytest.mark.parametrize("window", [None, 7, 64])
@torch.inference_mode()
def test_logits_do_not_depend_on_chunks_or_other_sequences(window: int | None) -> None:
    ours, theirs = make_pair(sliding_window=window)
    width = window or 64
    lengths = (1, width - 1, width, width + 1, 2 * width + 3)
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in lengths]
    expected = torch.stack([theirs(torch.tensor([p])).logits[0, -1] for p in prompts])
    for chunk_size in (1, 5, width - 1, width, width + 1, 2 * width + 3, None):
        together = ours.prefill(prompts, ours.new_cache(len(prompts), max(lengths)), chunk_size)
        assert relative_error(together, expected) < 1e-4, chunk_size
        alone = torch.cat(
            [ours.prefill([p], ours.new_cache(1, len(p)), chunk_size) for p in prompts]
        )
        assert relative_error(alone, expected) < 1e-4, chunk_size


@pytest.mark.parametrize("window", [None, 7, 64])
@torch.inference_mode()
def test_decode_steps_equal_the_full_forward_pass(window: int | None) -> None:
    """The layers have different windows, and thus rings of different sizes."""
    ours, _ = make_pair()
    config = replace(ours.config, sliding_window=(window, 3))
    weights = ours.state_dict()
    ours = MistralForCausalLM(config).eval()
    ours.load_state_dict(weights)
    ids = torch.randint(VOCAB, (2, 4 * (window or 16) + 9))
    expected = ours(ids).logits
    cache = ours.new_cache(2, ids.shape[1])
    for position in range(ids.shape[1]):
        logits = ours.decode(ids[:, position], cache)
        assert relative_error(logits, expected[:, position]) < 1e-4, position


@pytest.mark.parametrize("window", [None, 7, 64])
def test_greedy_generation_equals_transformers(window: int | None) -> None:
    """Generate four windows of new tokens, one prompt alone and prompts of unequal lengths."""
    ours, theirs = make_pair(sliding_window=window)
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (3, 17, 70)]
    new = 4 * (window or 16)
    expected = [
        theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
        for prompt in prompts
    ]
    alone = [ours.generate([p], max_new_tokens=new, eos_token_id=None)[0] for p in prompts]
    together = ours.generate(prompts, max_new_tokens=new, eos_token_id=None)
    for actual in (alone, together):
        assert_same_text(actual, expected, lambda ids: theirs(ids).logits)


def test_gradients_equal_transformers() -> None:
    ours, theirs = make_pair(sliding_window=7)
    ids = torch.randint(VOCAB, (2, 33))
    cotangent = torch.randn(2, 33, VOCAB)
    for model in (ours, theirs):
        model.zero_grad()
        model(ids).logits.backward(cotangent)
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    q, k, v = ours.model.layers[0].self_attn.qkv_proj.weight.grad.split([512, 128, 128])
    for name, grad in (("q", q), ("k", k), ("v", v)):
        expected = theirs_grads[f"model.layers.0.self_attn.{name}_proj.weight"]
        assert relative_error(grad, expected) < 1e-4
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert relative_error(ours.get_parameter(name).grad, theirs_grads[name]) < 1e-4


def test_state_dict_has_hugging_face_names() -> None:
    ours, theirs = make_pair(tie_word_embeddings=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    other = MistralForCausalLM(ours.config)
    other.load_state_dict(theirs.state_dict())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name
    state = theirs.state_dict()
    del state["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(RuntimeError, match=r"model.layers.0.self_attn.k_proj.weight"):
        other.load_state_dict(state)


def test_rotary_tables_stay_float32_in_bfloat16_models() -> None:
    """Positions near 130,000 have distinct angles only if the rotary tables are float32."""
    ours, theirs = make_pair(sliding_window=64, rope_theta=10_000.0)
    ours = ours.to(torch.bfloat16)
    assert "rotary" not in " ".join(ours.state_dict())
    ids = torch.randint(VOCAB, (1, 200))
    with torch.inference_mode():
        near = ours(ids).logits
        cache = ours.new_cache(1, 64)
        # Rotary scores depend only on distances, so the start position does not change the logits.
        # The empty rings count as 64 earlier tokens, which are outside the window at the end.
        cache.lengths.fill_(130_000)
        cache.host_lengths = [130_000]
        cache.keys, cache.values = (
            [torch.zeros_like(ring) for ring in rings] for rings in (cache.keys, cache.values)
        )
        far = ours.prefill(ids.tolist(), cache)
    reference = theirs(ids).logits[:, -1]
    assert relative_error(far, reference) < 2 * relative_error(near[:, -1], reference) + 1e-2
