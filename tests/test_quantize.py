"""`from_pretrained(quantize="int8")` and `generate --quantize int8`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_checkpoints import SMALL, varied_model

from mistral_kernels import MistralForCausalLM, MistralTokenizer
from mistral_kernels.generate import main
from mistral_kernels.model import engine
from mistral_kernels.model.layers import FusedLinear, Linear
from mistral_kernels.model.sampling import Sampler
from mistral_kernels.ops import extension
from mistral_kernels.text.streaming import generate

CONFIGS = {"untied": SMALL, "tied": replace(SMALL, tie_word_embeddings=True)}


@pytest.fixture(params=CONFIGS)
def models(request: Any, tmp_path: Path) -> tuple[MistralForCausalLM, MistralForCausalLM]:
    """Return a quantized model, and an ordinary model with the same weights in float32."""
    varied_model(CONFIGS[request.param]).save_pretrained(tmp_path / "m")
    quantized = MistralForCausalLM.from_pretrained(tmp_path / "m", quantize="int8")
    plain = MistralForCausalLM.from_pretrained(tmp_path / "m").requires_grad_(False)
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())  # no longer tied
    others = dict(quantized.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, Linear):
            int8 = others[name]
            assert isinstance(int8, Linear)
            assert int8.scales is not None
            wide = int8.weight * int8.scales[:, None]
            assert ((wide - module.weight).abs() <= 0.501 * int8.scales[:, None]).all(), name
            assert (int8.weight.int().abs().amax(dim=1) == 127).all()
            module.weight.data.copy_(wide)
    return quantized, plain


def test_only_weights_of_products_are_int8(
    models: tuple[MistralForCausalLM, MistralForCausalLM],
) -> None:
    """The weights of fused projections are int8 too; embedding and norms are unchanged."""
    quantized, plain = models
    products = [m for m in quantized.modules() if isinstance(m, Linear)]
    assert len(products) == 4 * SMALL.num_hidden_layers + 1
    assert sum(isinstance(m, FusedLinear) for m in products) == 2 * SMALL.num_hidden_layers
    assert all(m.weight.dtype == torch.int8 for m in products)
    rest = {name: p for name, p in quantized.named_parameters() if p.dtype != torch.int8}
    assert all("norm" in name or "embed" in name for name in rest)
    expected = dict(plain.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in rest.items())
    assert not any(p.requires_grad for p in quantized.parameters())
    elements = sum(m.weight.numel() + 4 * len(m.weight) for m in products)
    assert quantized.nbytes == elements + sum(p.nbytes for p in rest.values())
    assert plain.nbytes == sum(p.nbytes for p in plain.parameters())


def test_logits_equal_those_of_the_dequantized_weights(
    models: tuple[MistralForCausalLM, MistralForCausalLM],
) -> None:
    """Compare forward passes, prefill and decode steps."""
    ids = torch.randint(SMALL.vocab_size, (3, 20))
    results = []
    for model in models:
        whole = model(ids).logits
        with torch.inference_mode():
            cache = model.new_cache(3, 20)
            steps = [model.prefill(ids[:, :9].tolist(), cache)]
            steps += [model.decode(tokens, cache) for tokens in ids[:, 9:].T]
        results.append((whole, torch.stack(steps, dim=1)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_decoded_logits_are_bitwise_equal(monkeypatch: Any) -> None:
    """Decode alone and in a batch, with one call of csrc per step and with the modules."""
    if not extension.load("cpu"):
        pytest.skip(extension.status("cpu"))
    model = MistralForCausalLM.from_pretrained("tiny", quantize="int8")
    ids = torch.randint(2048, (32, 9))

    @torch.inference_mode()
    def decode(batch: int) -> torch.Tensor:
        cache = model.new_cache(batch, 9)
        return torch.stack([model.decode(tokens[:batch], cache) for tokens in ids.T])

    many = decode(32)
    for batch in (1, 5):
        assert torch.equal(decode(batch), many[:, :batch])
    monkeypatch.setattr(engine, "_can_use_csrc", lambda *_: False)
    assert torch.equal(decode(32), many)


def test_casting_changes_neither_int8_weights_nor_scales() -> None:
    """Casting the model changes the dtype of hidden states and caches."""
    model = MistralForCausalLM.from_pretrained("tiny", quantize="int8")
    assert model.dtype == model.new_cache(1, 4).keys[0].dtype == torch.bfloat16
    ids = torch.randint(2048, (1, 40))
    before = model(ids).logits
    assert before.dtype == torch.bfloat16
    model.to(torch.float32)
    assert model.dtype == torch.float32
    assert model(ids).logits.dtype == torch.float32
    assert torch.equal(model.to(torch.bfloat16)(ids).logits, before)


def test_unsupported_uses_raise_an_error(tmp_path: Path) -> None:
    model = MistralForCausalLM.from_pretrained("tiny", quantize="int8")
    plain = MistralForCausalLM.from_pretrained("tiny")
    message = "cannot return or load a state dict; save and load the unquantized model"
    for attempt in (
        model.state_dict,
        model.lm_head.state_dict,
        model.model.layers[0].mlp.gate_up_proj.state_dict,
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: model.load_state_dict(plain.state_dict()),
    ):
        with pytest.raises(NotImplementedError, match=message):
            attempt()
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="quantize must be None or 'int8', got 'int4'"):
        MistralForCausalLM.from_pretrained("tiny", quantize="int4")
    with pytest.raises(NotImplementedError, match="must be the CPU with quantize='int8', got meta"):
        MistralForCausalLM.from_pretrained("tiny", quantize="int8", device="meta")


def test_without_csrc_pytorch_runs_with_a_warning(monkeypatch: Any, caplog: Any) -> None:
    ids = torch.randint(2048, (1, 40))
    options = {"quantize": "int8", "dtype": torch.float32}
    expected = MistralForCausalLM.from_pretrained("tiny", **options)(ids).logits
    assert not caplog.records or not extension.load("cpu")
    monkeypatch.setattr(extension, "load", lambda device_type: None)
    with caplog.at_level("WARNING"):
        model = MistralForCausalLM.from_pretrained("tiny", **options)
    assert "slower than unquantized weights" in caplog.text
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_generate_command_quantizes(capsys: Any) -> None:
    """The command prints the text of the quantized model, and its size in the statistics."""
    options = ["--temperature", "0", "-m", "8", "--device", "cpu", "--quantize", "int8"]
    assert main(["Her sister was", *options]) == 0
    printed = capsys.readouterr()
    model = MistralForCausalLM.from_pretrained("tiny", quantize="int8")
    assert f"{model.nbytes / 1e6:.1f} MB of int8 and bfloat16" in printed.err
    tokenizer = MistralTokenizer.from_pretrained("tiny")
    sampler = Sampler(temperature=0)
    (completion,) = generate(model, tokenizer, ["Her sister was"], max_tokens=8, sampler=sampler)
    assert printed.out == completion.text + "\n"
    with pytest.raises(SystemExit, match="2"):
        main(["a", "--quantize", "int4"])
    assert "argument --quantize: invalid choice: 'int4'" in capsys.readouterr().err
