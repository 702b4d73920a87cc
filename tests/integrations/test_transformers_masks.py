"""attn_implementation="mistral_kernels": selection, masks and errors."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import pickle
import re
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.transformers_cases import (  # noqa: E402
    CACHE,
    OLD_MASKS,
    VOCAB,
    W,
    assert_close,
    batch,
    both,
    make_model,
    new_cache,
)
from transformers import masking_utils  # noqa: E402

from mistral_kernels.integrations import transformers_attention  # noqa: E402
from mistral_kernels.integrations.mask import Mask, MaskError  # noqa: E402
from mistral_kernels.integrations.transformers import RollingCache, register  # noqa: E402
from mistral_kernels.integrations.transformers_attention import attend  # noqa: E402
from mistral_kernels.integrations.transformers_masks import (  # noqa: E402
    create_mask,
    make_descriptor,
)


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def test_from_pretrained_and_back(tmp_path: Any) -> None:
    make_model().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="mistral_kernels"
    ).eval()
    ids, _ = batch(2 * W)
    with torch.no_grad():
        ours = model(ids).logits
        for name in ("sdpa", "eager", "mistral_kernels"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert_close(model(ids).logits, ours)
    assert torch.equal(model(ids).logits, ours)


def layer(model: Any) -> tuple[Any, Tensor, Tensor]:
    module = model.model.layers[0].self_attn
    return module, torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dropout": 0.1},
            "dropout is not supported, got 0.1: set config.attention_dropout = 0, or use "
            "attn_implementation='sdpa'",
        ),
        (
            {"s_aux": torch.zeros(4)},
            "s_aux is not supported: for attention sinks use attn_implementation='eager'",
        ),
        (
            {"position_bias": torch.zeros(1)},
            "position_bias is not supported: use attn_implementation='sdpa'",
        ),
        (
            {"head_mask": torch.ones(4)},
            "head_mask is not supported: use attn_implementation='eager'",
        ),
        (
            {"cache": object()},
            "cache is not supported: for paged caches use attn_implementation='sdpa'",
        ),
    ],
)
def test_unsupported_arguments(given: dict[str, Any], message: str) -> None:
    module, q, kv = layer(make_model())
    with pytest.raises(NotImplementedError) as error:
        attend(module, q, kv, kv, None, sliding_window=None, **given)
    assert str(error.value) == message


def test_dropout_raises_in_training() -> None:
    model = make_model(attention_dropout=0.5)
    model.set_attn_implementation("mistral_kernels")
    ids, _ = batch(5)
    model(ids)
    with pytest.raises(
        NotImplementedError, match=r"^dropout is not supported, got 0.5: set config"
    ):
        model.train()(ids)


def test_a_layer_that_does_not_pass_its_window() -> None:
    """Models that apply the window only in the mask must raise instead of running without one."""
    module, q, kv = layer(make_model())
    with pytest.raises(NotImplementedError) as error:
        attend(module, q, kv, kv, None)
    assert str(error.value) == (
        "MistralAttention must pass sliding_window to its attention function, because "
        f"config.sliding_window is {W} and a layer may have no window; use "
        "attn_implementation='sdpa'"
    )


def test_bad_input() -> None:
    module, q, kv = layer(make_model())
    wide = torch.randn(1, 1, 5, 264)
    with pytest.raises(ValueError, match=r"^query's head_dim must be in .1, 256., got 264$"):
        attend(module, wide, wide, wide, None, sliding_window=None)
    remedy = "call set_attn_implementation() on the whole model"
    for mask in (torch.ones(1, 1, 5, 5, dtype=torch.int32), torch.ones(1, 5, dtype=torch.bool)):
        message = (
            "attention_mask must be a 3-D or 4-D tensor, bool or floating point, got "
            f"{tuple(mask.shape)} of {mask.dtype}: {remedy}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            attend(module, q, kv, kv, mask, sliding_window=None)
    message = (
        "attention_mask must be a 3-D or 4-D tensor, bool or floating point, or the mask of "
        f"attn_implementation='mistral_kernels', got object: {remedy}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attend(module, q, kv, kv, object(), sliding_window=None)
    message = f"attention_mask must not be None for 3 queries and 5 keys: {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attend(module, q[:, :, 2:], kv, kv, None, sliding_window=None)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    padded = Mask((1, 1, 5, 5), descriptor=make_descriptor([1], 0, 0, 1, "cpu"))
    message = "attention_mask must be None if cu_seq_lens_q is given: a packed batch has no padding"
    with pytest.raises(ValueError, match=f"^{message}$"):
        attend(module, q, kv, kv, padded, sliding_window=None, cu_seq_lens_q=offsets)


def test_bidirectional() -> None:
    module, q, kv = layer(make_model())
    module.is_causal = False
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, *(kv.repeat_interleave(2, dim=1),) * 2
    ).transpose(1, 2)
    out, _ = attend(module, q, kv, kv, None, sliding_window=None)
    assert_close(out, expected)
    out, _ = attend(make_model().model.layers[0].self_attn, q, kv, kv, None, is_causal=False)
    assert_close(out, expected)


def test_masks_of_every_pattern() -> None:
    """Create masks of transformers' patterns, causal and others."""

    def make(function: Any, **given: Any) -> Any:
        sizes: dict[str, Any] = {"batch_size": 1, "kv_length": 6}
        if OLD_MASKS:
            sizes["cache_position"] = torch.arange(6)
        else:
            sizes["q_length"] = 6
        return create_mask(**sizes, mask_function=function, **given)

    causal, sliding = (
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(3),
    )
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    for plain in (make(causal), make(sliding, local_size=3)):
        assert plain.is_plain
        assert plain.shape == (1, 1, 6, 6)

    def odd(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx % 2 == 1

    chunked = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.long))
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()
    for function, expected in (
        (odd, (torch.arange(6) % 2 == 1).expand(6, 6)),
        (masking_utils.and_masks(causal, odd), lower & (torch.arange(6) % 2 == 1)),
        (masking_utils.or_masks(causal, odd), lower | (torch.arange(6) % 2 == 1)),
        (chunked, lower & blocks),
        (masking_utils.sliding_window_overlay(3), ~lower.tril(-3)),
    ):
        made = make(function)
        assert torch.equal(made[0, 0] == 0, expected)
        assert made.max() == 0
    parameters = inspect.signature(masking_utils.create_causal_mask).parameters
    if "allow_is_causal_skip" in parameters:  # passed by callers that modify the mask
        made = make(causal, allow_is_causal_skip=False)
        assert torch.equal(made[0, 0] == 0, lower)


@torch.no_grad()
def test_models_that_read_or_modify_masks() -> None:
    """Test GPT-2, which reads the dimensions of a mask, and Falcon, which adds biases to it."""
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"hidden_size": 32, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, alibi=True))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    ids, attention_mask = batch(2 * W, "left")
    given = {"attention_mask": attention_mask, "max_new_tokens": 4, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    static = {"cache_implementation": "static", "disable_compile": True}
    for model, cache in ((falcon, {}), (gpt2, {}), (gpt2, static)):
        ours, eager = both(model.eval(), model.generate, ids, **given, **cache)
        assert_close(torch.stack(ours.logits), torch.stack(eager.logits))


# Layers with another implementation than the model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@torch.no_grad()
def test_other_attentions_raise_for_our_mask(implementation: str, padding: str) -> None:
    """Give a layer with another attention our mask, for prompts and single tokens."""
    model = make_model()
    model.set_attn_implementation(implementation)
    foreign = copy.deepcopy(model.model.layers[1])
    model.set_attn_implementation("mistral_kernels")
    ids, attention_mask = batch(2 * W, "none" if padding == "holes" else padding)
    if padding == "holes":
        attention_mask[:, 3] = 0
    given = {} if padding == "none" else {"attention_mask": attention_mask}
    cache = new_cache("dynamic", model, 0)
    with_cache = dict(given)
    if given:
        with_cache["attention_mask"] = attention_mask[:, :-1]
    model(ids[:, :-1], **{CACHE: cache}, **with_cache)
    model.model.layers[1] = foreign
    for step in ({}, {CACHE: cache}):
        with pytest.raises(MaskError) as error:
            model(ids[:, -1:] if step else ids, **given, **step)
        assert str(error.value) == (
            "attention_mask must be used with attn_implementation='mistral_kernels', which created "
            "it: set the same attn_implementation for the model and for layers with a config of "
            "their own, or use 'sdpa'"
        )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_our_attention_reads_other_masks(implementation: str, padding: str, kind: str) -> None:
    """Give a layer with our attention the masks of another implementation."""
    model = make_model()
    model.set_attn_implementation("mistral_kernels")
    ours = copy.deepcopy(model.model.layers[1])
    assert ours.self_attn.config._attn_implementation == "mistral_kernels"
    model.set_attn_implementation(implementation)
    theirs = model.model.layers[1]
    for seqlen in (W - 2, 2 * W):
        ids, attention_mask = batch(seqlen, padding)
        given = {} if padding == "none" else {"attention_mask": attention_mask}
        logits = []
        for layer in (theirs, ours):
            model.model.layers[1] = layer
            cache, parts = new_cache(kind, model, seqlen + 2), []
            ends = (seqlen - 3, seqlen - 1, seqlen)
            if OLD_MASKS and kind == "static":  # supports only prompts and single tokens
                ends = (seqlen - 1, seqlen)
            for begin, end in itertools.pairwise((0, *ends)):
                now = {name: x[:, :end] for name, x in given.items()}
                if OLD_MASKS:
                    now["cache_position"] = torch.arange(begin, end)
                parts.append(model(ids[:, begin:end], **{CACHE: cache}, **now).logits)
            logits.append(torch.cat(parts, 1)[attention_mask.bool()])
        assert_close(*logits)


def test_a_mask_can_be_moved() -> None:
    """Move a mask between devices, as accelerate moves the inputs of layers."""
    mask = Mask((1, 1, 2, 5), descriptor=make_descriptor([1], 3, 0, 1, "cpu"), starts=[1])
    moved = mask.to("meta", non_blocking=True)
    assert moved.descriptor.is_meta
    assert moved.shape == (1, 1, 2, 5)
    assert moved.starts == [1]
    assert mask.to("cpu") is mask
    assert mask.dim() == mask.ndim == 4
    with pytest.raises(MaskError, match=r"^attention_mask must be used with"):
        mask.to(torch.bool)


# Unsupported features


@pytest.mark.parametrize("requested", ["by the call", "by the config", "by generate"])
@torch.no_grad()
def test_output_attentions(requested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warn once and return no weights, like sdpa."""
    warnings: list[str] = []
    monkeypatch.setattr(transformers_attention._logger, "warning_once", warnings.append)
    model, (ids, _) = make_model(), batch(W)
    given = {} if requested == "by the config" else {"output_attentions": True}
    results = []
    for name in ("sdpa", "mistral_kernels"):
        if requested == "by the config":  # a config accepts it with eager attention only
            model.set_attn_implementation("eager")
            model.config.output_attentions = True
        model.set_attn_implementation(name)
        if requested == "by generate":
            given |= {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
            results.append(model.generate(ids, **given))
        else:
            results.append(model(ids, **given))
    assert results[0].attentions == results[1].attentions
    assert set(warnings) == {
        "attn_implementation='mistral_kernels' does not support output_attentions=True: it never "
        "computes the attention weights. Use attn_implementation='eager'"
    }


@torch.no_grad()
def test_a_rolling_cache_raises_for_packed_batches_and_right_padding() -> None:
    model = make_model()
    model.set_attn_implementation("mistral_kernels")
    ids, attention_mask = batch(2 * W, "right")
    positions = torch.arange(2 * W)[None] % W
    offsets = torch.tensor([0, 3 * W, 6 * W], dtype=torch.int32)
    for packed in ({"position_ids": positions}, {"cu_seq_lens_q": offsets}):
        with pytest.raises(NotImplementedError) as error:
            model(ids, **{CACHE: RollingCache(model.config)}, **packed)
        assert str(error.value) == (
            "a packed batch is not supported with RollingCache; pad it, or use another cache"
        )
    message = (
        "attention_mask must be causal with padding on the left only, got another mask of shape "
        f"(3, 1, {2 * W}, {2 * W}): RollingCache does not store padding"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(ids, attention_mask=attention_mask, **{CACHE: RollingCache(model.config)})


def test_outdated_or_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    required = "mistral_kernels.integrations.transformers requires transformers >= 4.56"
    name = "mistral_kernels.integrations.versions"
    versions = importlib.import_module(name)
    old = types.ModuleType("transformers")
    old.__version__ = "4.40.1"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(ImportError) as error:
        importlib.reload(versions)
    assert str(error.value) == f"{required}, found 4.40.1; run pip install -U transformers"
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as error:
        importlib.reload(versions)
    assert str(error.value) == f"{required}; run pip install 'mistral_kernels[hf]'"


@torch.no_grad()
def test_a_rolling_cache_can_be_pickled() -> None:
    model, (ids, _) = make_model(), batch(2 * W)
    model.set_attn_implementation("mistral_kernels")
    cache = RollingCache(model.config)
    for make_twin in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        model(ids, **{CACHE: cache})
        token = torch.randint(1, VOCAB, (3, 1))
        twin = make_twin(cache)
        expected = model(token, **{CACHE: cache}).logits
        assert torch.equal(model(token, **{CACHE: twin}).logits, expected)
