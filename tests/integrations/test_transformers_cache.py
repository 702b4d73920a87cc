"""Rolling cache of transformers' `generate`: the same text as with eager attention."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from support.helpers import assert_as_accurate, assert_same_text, unpadded
from torch import Tensor

transformers = pytest.importorskip("transformers")

from mistral_kernels.integrations.transformers import register  # noqa: E402
from mistral_kernels.integrations.transformers_cache import (  # noqa: E402
    RollingCache,
    layer_windows,
)

W = 12
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # attention is far from uniform
}
# Name of a forward pass' cache argument, which transformers 5 renamed.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.MistralForCausalLM.forward).parameters
)


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def make_model(kind: str = "Mistral", **changes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        **{**SIZES, "num_hidden_layers": 3, "max_position_embeddings": 512, **changes}
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = SIZES["vocab_size"]  # never generated
    return model


def mistral(**changes: Any) -> Any:
    return make_model(**{"sliding_window": W, **changes})


def prompts(batch: int, seqlen: int, padding: tuple[int, ...] = ()) -> dict[str, Tensor]:
    ids = torch.randint(1, 97, (batch, seqlen))
    attention_mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        attention_mask[row, :n] = 0
    return {"input_ids": ids.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}


def generate(model: Any, cache: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Generate with our attention over a rolling cache, and with eager attention otherwise."""
    rolling = isinstance(cache, RollingCache)
    model.set_attn_implementation("mistral_kernels" if rolling else "eager")
    torch.manual_seed(5)
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, **{CACHE: cache}, **options)


def both(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    rolling = RollingCache(model.config, max_length=80)
    return generate(model, rolling, inputs, **options), generate(model, None, inputs, **options)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("padding", [(), (3, 0, 1), (6, 4, 5)], ids=["", "padded", "late"])
@pytest.mark.parametrize("seqlen", [7, W, 31])
@pytest.mark.parametrize("mode", MODES)
def test_generates_the_same_text(mode: str, seqlen: int, padding: tuple[int, ...]) -> None:
    """Test texts below, at and past the window. All `late` rows begin in the second chunk."""
    if mode == "chunks" and transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 drops the attention mask after a prefill in chunks")
    actual, expected = both(mistral().double(), prompts(3, seqlen, padding), **MODES[mode])
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("seqlen", [1, 2, 40])
def test_a_single_text(seqlen: int) -> None:
    actual, expected = both(mistral().double(), prompts(1, seqlen))
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize(
    "make",
    [
        lambda: make_model("Llama"),
        lambda: mistral(sliding_window=None),
        lambda: make_model("Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ],
    ids=["Llama", "no window", "some windows"],
)
def test_layers_without_a_window(make: Any) -> None:
    model = make().double()
    actual, expected = both(model, prompts(2, 17, (4,)))
    assert torch.equal(actual, expected)
    full = layer_windows(model.config).index(None)
    message = f"max_length is required: layer {full} has no sliding window and stores every token"
    with pytest.raises(ValueError, match=message):
        RollingCache(model.config)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare float32 logits. A query that sees a wrong key changes them by about 0.1 or more."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def step(model: Any, cache: Any, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return model(ids, attention_mask=attention_mask, use_cache=True, **{CACHE: cache}).logits


@pytest.mark.parametrize("padding", [(), (5, 0)], ids=["", "padded"])
def test_logits_of_any_chunks(padding: tuple[int, ...]) -> None:
    """Test chunks of one token and of more, up to three times the window."""
    model, inputs = mistral(), prompts(2, 3 * W, padding)
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    model.set_attn_implementation("sdpa")
    plain = step(model, None, ids, seen)
    exact = step(model.double(), None, ids, seen)
    model.float().set_attn_implementation("mistral_kernels")
    cache, start, parts = RollingCache(model.config), 0, []
    for n in (3, 1, 1, 9, W + 1, 1, 1, 7):
        end = start + n
        parts.append(step(model, cache, ids[:, start:end], seen[:, :end] if padding else None))
        assert torch.isfinite(parts[-1]).all()
        assert cache.get_seq_length() == end
        assert (
            cache.rings.host_lengths
            == cache.rings.lengths.tolist()
            == seen[:, :end].sum(1).tolist()
        )
        start = end
    real = seen.bool()
    assert_as_accurate(torch.cat(parts, 1)[real], plain[real], exact[real], "logits")


@pytest.mark.kernels
def test_kernels(triton_backend: None, device: torch.device) -> None:
    model = mistral(num_hidden_layers=1).to(device)
    inputs = {name: x.to(device) for name, x in prompts(2, W + 4, (3,)).items()}
    texts = both(model, inputs, max_new_tokens=4)
    actual, expected = (unpadded(text, inputs["attention_mask"]) for text in texts)
    assert_same_text(actual, expected, lambda ids: model(ids.to(device)).logits)


@pytest.mark.usefixtures("exact_softmax")
def test_a_conversation() -> None:
    """Continue the text that `generate` returned by further calls with the same cache."""
    model, inputs = mistral().double(), prompts(2, 9, (2,))
    rolling, dynamic = RollingCache(model.config), transformers.DynamicCache(config=model.config)
    for _ in range(3):
        actual = generate(model, rolling, inputs, max_new_tokens=6)
        expected = generate(model, dynamic, inputs, max_new_tokens=6)
        assert torch.equal(actual, expected)
        more = torch.randint(1, 97, (2, 4))
        ids = torch.cat((actual, more), 1)
        ones = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
        seen = torch.cat((inputs["attention_mask"], ones), 1)
        inputs = {"input_ids": ids, "attention_mask": seen}
        addresses = ring_addresses(rolling)
    assert ring_addresses(rolling) == addresses


def ring_addresses(cache: Any) -> list[int]:
    return [ring.data_ptr() for ring in (*cache.rings.keys, *cache.rings.values)]


def test_memory_is_constant() -> None:
    model = mistral()
    cache = RollingCache(model.config)
    assert cache.nbytes == 0
    assert cache.batch_size == -1
    assert not cache.layers[0].is_initialized
    generate(model, cache, prompts(2, 5), max_new_tokens=1)
    size, addresses = cache.nbytes, ring_addresses(cache)
    assert size == 2 * 3 * 2 * W * 2 * 16 * 4
    assert cache.batch_size == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    generate(model, cache, prompts(2, 40), max_new_tokens=30)
    assert cache.get_seq_length() == 69
    assert cache.nbytes == size
    assert ring_addresses(cache) == addresses


def test_properties_of_an_empty_cache() -> None:
    model = mistral()
    for max_length, longest in ((None, -1), (W, -1), (W - 1, W - 1)):
        cache = RollingCache(model.config, max_length)
        assert len(cache) == 3
        assert cache.is_sliding == [True] * 3
        assert not cache.is_compileable
        assert cache.get_seq_length() == 0
        get_max_length = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
        assert get_max_length() == longest
        assert repr(cache.layers[0]) == f"RollingLayer(sliding_window={W})"
    cache.crop(0)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    assert cache.nbytes == 0


@pytest.mark.usefixtures("exact_softmax")
def test_early_initialization() -> None:
    model = mistral().double()
    cache = RollingCache(model.config)
    cache.early_initialization(3, 2, 16, torch.float64, torch.device("cpu"))
    addresses = ring_addresses(cache)
    actual = generate(model, cache, (inputs := prompts(3, 6)))
    assert torch.equal(actual, generate(model, None, inputs))
    assert ring_addresses(cache) == addresses


class CountingCache(RollingCache):
    """Rolling cache that counts the tokens that `crop` drops."""

    dropped = 0

    def crop(self, length: int) -> None:
        before = self.columns
        super().crop(length)
        self.dropped += before - self.columns


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_assisted_generation(draft: str) -> None:
    """Drop drafted tokens that are rejected, which is possible until the rings are full."""
    model, inputs = mistral(sliding_window=40).double(), prompts(1, 8)
    inputs["input_ids"][:, 4:] = inputs["input_ids"][:, :4]
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if draft == "assistant":
        assistant = copy.deepcopy(model)
        with torch.no_grad():
            assistant.lm_head.weight += 0.2 * torch.randn_like(assistant.lm_head.weight)
        options = {"assistant_model": assistant}
    cache = CountingCache(model.config)
    actual = generate(model, cache, inputs, **options)
    assert torch.equal(actual, generate(model, None, inputs))
    assert cache.dropped > 0
    if draft == "lookup":
        with pytest.raises(ValueError, match=r"can be cropped|count must be at least 0"):
            generate(model, RollingCache(model.config), prompts(1, 45), **options)


def test_crop_within_and_past_the_window() -> None:
    model, inputs = mistral(), prompts(1, W + 8)
    model.set_attn_implementation("mistral_kernels")
    cache = RollingCache(model.config)
    ids = inputs["input_ids"]
    step(model, cache, ids[:, :W], None)
    assert cache.is_croppable
    cache.crop(-5)
    assert cache.get_seq_length() == W - 5
    cache.crop(4)
    assert cache.get_seq_length() == 4
    cache.crop(9)
    assert cache.get_seq_length() == 4, "the cache is already shorter than 9 tokens"
    step(model, cache, ids[:, 4:], None)
    assert not cache.is_croppable
    cache.crop(-1)
    logits = step(model, cache, ids[:, -1:], None)
    model.set_attn_implementation("eager")
    assert_close(logits[:, -1], step(model, None, ids, None)[:, -1])
    with pytest.raises(ValueError, match=r"count must be .*, got 2 for sequences of .* in rings"):
        cache.crop(-2)


def test_rows_can_be_selected_and_repeated() -> None:
    model, inputs = mistral(), prompts(2, 15, (4,))
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    model.set_attn_implementation("mistral_kernels")
    cache = RollingCache(model.config)
    step(model, cache, ids, seen)
    twin = copy.deepcopy(cache)
    next_ids = torch.randint(1, 97, (2, 1))
    grown = torch.cat((seen, torch.ones_like(next_ids)), 1)
    expected = step(model, twin, next_ids, grown)
    twin.crop(-1)
    twin.batch_repeat_interleave(2)
    assert twin.batch_size == 4
    rows = torch.tensor([0, 0, 1, 1])
    actual = step(model, twin, next_ids[rows], grown[rows])
    assert_close(actual, expected[rows])
    twin.crop(-1)
    twin.batch_select_indices(torch.tensor([True, False, False, True]))
    twin.reorder_cache(torch.tensor([1, 0]))
    actual = step(model, twin, next_ids.flip(0), grown.flip(0))
    assert_close(actual, expected.flip(0))
    assert cache.get_seq_length() == 15
    assert cache.rings.host_lengths == [11, 15]
    assert_close(step(model, cache, next_ids, grown), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attentions_raise(implementation: str) -> None:
    model = mistral()
    model.set_attn_implementation(implementation)
    message = "RollingCache must be used with attn_implementation='mistral_kernels'; call register"
    with pytest.raises(TypeError, match=message):
        step(model, RollingCache(model.config), torch.tensor([[3, 4]]), None)


def test_pending_keys_raise_in_tensor_functions() -> None:
    cache = RollingCache(mistral().config)
    pending, _ = cache.update(*torch.zeros(2, 1, 2, 1, 16), 0)
    for use in (lambda: torch.cat([pending]), lambda: pending[0], lambda: pending.shape):
        with pytest.raises(TypeError, match=r"^RollingCache must be used with attn_imp"):
            use()


def test_autocast() -> None:
    """Under autocast, keys have a wider dtype than values."""
    model, ids = mistral(), prompts(2, 6)["input_ids"]
    model.set_attn_implementation("mistral_kernels")
    cache = RollingCache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.cat([step(model, cache, ids[:, i : i + 3], None) for i in (0, 3)], 1)
        assert cache.rings.keys[0].dtype == torch.bfloat16
        model.set_attn_implementation("sdpa")
        plain = step(model, None, ids, None)
    assert_as_accurate(actual, plain, step(model.double(), None, ids, None), "logits")


def test_bad_input() -> None:
    model = mistral()
    model.set_attn_implementation("mistral_kernels")
    cache = RollingCache(model.config)
    ids = torch.randint(1, 97, (2, 6))
    step(model, cache, ids, None)
    message = (
        "keys must have 2 heads of size 16, torch.float32 on cpu, as in the cache, got 2 heads of "
        "size 16, torch.float64 on cpu; after moving"
    )
    with pytest.raises(ValueError, match=message):
        step(model.double(), cache, ids, None)
    model.float()
    with pytest.raises(ValueError, match="batch must be 2, that of the cache, got 3; create a"):
        step(model, cache, torch.ones(3, 1, dtype=torch.long), None)
    late = torch.ones(2, 9, dtype=torch.long)
    late[1, :2] = 0
    with pytest.raises(ValueError, match=r"must have 6 ones for the cached tokens of row 1, got 4"):
        step(model, cache, ids[:, :3], late)
    holes = torch.ones(2, 9, dtype=torch.long)
    holes[0, 5] = 0
    for n in (3, 1):
        with pytest.raises(ValueError, match=r"^attention_mask must be causal with padding on"):
            step(model, cache, ids[:, :n], holes[:, : 6 + n])
    assert cache.get_seq_length() == 6, "a failed pass changed the cache"
    with pytest.raises(RuntimeError, match=r"^RollingCache does not support gradients: run under"):
        model(ids, use_cache=True, **{CACHE: cache})
    step(model, cache, ids, None)
    short = RollingCache(model.config, max_length=W - 2)
    with pytest.raises(ValueError, match=r"sequence length must be <= .*, got 12; make a cache"):
        step(model, short, torch.ones(2, W, dtype=torch.long), None)
    with pytest.raises(ValueError, match="max_length must be positive, got 0"):
        RollingCache(model.config, 0)
    other = RollingCache(mistral(sliding_window=W + 1).config)
    with pytest.raises(ValueError, match=r"sliding_window of layer 0 must be 13, .* got 12: t"):
        step(model, other, ids, None)


def test_unsupported_configs() -> None:
    config = mistral().config
    config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    message = "must be full_attention or sliding_attention with RollingCache, got chunked_attention"
    with pytest.raises(ValueError, match=rf"^layer_types\[1\] {message}$"):
        RollingCache(config, 10)
    config = mistral().config
    config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match=r"^num_kv_shared_layers must be 0 with Rolling.*, got 2"):
        RollingCache(config)
