"""A decoder layer's step in one call: the bits of its operators called one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FLOATS
from torch import Tensor, nn

from mistral_kernels import RollingCache
from mistral_kernels.model import layers
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.layers import DecoderLayer
from mistral_kernels.ops import decoder_layer as op
from mistral_kernels.ops import extension
from mistral_kernels.ops.linear import KERNEL_ROWS
from mistral_kernels.ops.linear_int8 import quantize_int8
from mistral_kernels.ops.rotary import rotary_tables

CONFIG = MistralConfig(
    vocab_size=8,
    hidden_size=52,
    intermediate_size=70,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=24,
    sliding_window=7,
)


class Step:
    """A layer of random weights, a cache that sequences of several lengths have filled, a token."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, batch: int = 3, **overrides: Any
    ) -> None:
        config = MistralConfig(**{**vars(CONFIG), **overrides})
        self.layer = DecoderLayer(config, 0).to(dtype).requires_grad_(False)
        for weight in self.layer.parameters():
            weight.copy_(torch.randn(weight.shape))
        self.cache = RollingCache(config, batch, 20, dtype)
        for ring in (self.cache.keys[0], self.cache.values[0]):
            ring.normal_()
        self.cache.host_lengths = [5 * i % 19 for i in range(batch)]
        self.cache.lengths.copy_(torch.tensor(self.cache.host_lengths))
        self.tables = rotary_tables(20, config.head_dim, config.rope_theta, "cpu")
        self.delta, self.residual = torch.randn(2, batch, config.hidden_size).to(dtype)
        self.calls = 0

    def run(self, monkeypatch: Any, residual: bool = True, alone: bool = False) -> list[Tensor]:
        """The layer's outputs and the rings; `alone`: its operators one by one."""
        rings = [self.cache.keys[0], self.cache.values[0]]
        before = [ring.clone() for ring in rings]

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return op.decoder_layer(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(layers, "decoder_layer", counted)
            if alone:
                patch.setattr(layers, "serves", lambda *args: False)
            packing = self.cache.packing([1] * self.cache.batch)
            stream = self.residual if residual else None
            outputs = self.layer(self.delta, stream, self.tables, packing, self.cache)
        after = [ring.clone() for ring in rings]
        for ring, old in zip(rings, before):
            ring.copy_(old)
        return [*outputs, *after]


def assert_same_bits(step: Step, monkeypatch: Any, **options: Any) -> None:
    with torch.no_grad():
        together = step.run(monkeypatch, **options)
        assert step.calls == 1
        one_by_one = step.run(monkeypatch, alone=True, **options)
    assert step.calls == 1
    for a, b in zip(together, one_by_one):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, KERNEL_ROWS])
@pytest.mark.parametrize("residual", [True, False])
def test_same_bits(residual, batch, dtype, operators, monkeypatch):
    assert_same_bits(Step(dtype, batch), monkeypatch, residual=residual)


@pytest.mark.parametrize("window", [None, 1, 64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_windows_and_threads(window, threads, operators, monkeypatch):
    torch.set_num_threads(threads)
    step = Step(torch.bfloat16, 2, sliding_window=window, hidden_size=512, intermediate_size=1024)
    assert_same_bits(step, monkeypatch)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8(dtype, operators, monkeypatch):
    step = Step(dtype)
    for module in step.layer.modules():
        if isinstance(module, layers.Linear):
            weight, module.scales = quantize_int8(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
    assert_same_bits(step, monkeypatch)


def replace_module(step: Step) -> None:
    step.layer.mlp.down_proj = nn.Linear(70, 52, bias=False)


def watch(step: Step) -> None:
    step.layer.self_attn.o_proj.register_forward_hook(lambda *args: None)


def watch_before(step: Step) -> None:
    step.layer.mlp.register_forward_pre_hook(lambda *args: None)


def override(step: Step) -> None:
    attention = step.layer.self_attn
    attention.forward = type(attention).forward.__get__(attention)


@pytest.mark.parametrize("change", [replace_module, watch, watch_before, override])
def test_modules_that_have_to_be_called(change, monkeypatch):
    step = Step()
    change(step)
    with torch.no_grad():
        step.run(monkeypatch)
    assert step.calls == 0


def test_a_hook_for_every_module(monkeypatch):
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    step = Step()
    try:
        with torch.no_grad():
            step.run(monkeypatch)
    finally:
        hook.remove()
    assert step.calls == 0 and step.layer.mlp in seen


@pytest.mark.parametrize(
    "options", [{"batch": KERNEL_ROWS + 1}, {"head_dim": 12}, {"dtype": torch.float64}], ids=str
)
def test_what_is_not_served(options, monkeypatch):
    step = Step(**options)
    with torch.no_grad():
        step.run(monkeypatch)
    assert step.calls == 0


def test_gradients_and_autocast(monkeypatch):
    step = Step()
    step.layer.requires_grad_(True)
    delta, *_ = step.run(monkeypatch)
    assert delta.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not op.serves(step.delta, 24)
    assert step.calls == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": lambda x: x + 100}, r"lengths must lie in the tables' \[0, 20\), got 100"),
        ({"lengths": lambda x: x.long()}, "lengths has the wrong device or dtype"),
        ({"cu_seqlens": lambda x: x + 1}, "cu_seqlens must count from 0 to 3"),
        ({"k_cache": lambda x: x[:2]}, "k_cache must hold 3 sequences"),
        ({"v_cache": lambda x: x[:, 1:]}, "v_cache must have k_cache's shape"),
        ({"v_cache": lambda x: x.double()}, "v_cache has the wrong device or dtype"),
        ({"k_cache": lambda x: x.mT.contiguous().mT}, "k_cache must be contiguous"),
        ({"delta": lambda x: x[:, 1:].contiguous()}, r"out must be \(3, 51\)"),
        ({"down": lambda x: x[:-1]}, r"down must be \(52, 70\)"),
        ({"qkv": lambda x: x[1:]}, r"qkv must be \(240, 52\)"),
        ({"o": lambda x: x[:, 24:]}, "k_cache's heads must divide q's"),
        ({"mlp_norm": lambda x: x.half()}, "mlp_norm has the wrong device or dtype"),
        ({"cos": lambda x: x[:, 1:]}, r"cos must be \(20, 12\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(change, message):
    operators = extension.load("cpu")
    if operators is None:
        pytest.skip(extension.status("cpu"))
    step = Step()
    weights = step.layer._weights()
    cache = step.cache
    arguments = {
        "delta": step.delta,
        "residual": step.residual,
        **weights._asdict(),
        "cos": step.tables[0],
        "sin": step.tables[1],
        "k_cache": cache.keys[0],
        "v_cache": cache.values[0],
        "lengths": cache.lengths,
        "cu_seqlens": cache._one_each,
        "window_left": 6,
        "eps": 1e-5,
        "out": torch.empty_like(step.delta),
        "residual_out": torch.empty_like(step.delta),
    }
    before = cache.keys[0].clone(), cache.values[0].clone()
    changed = {name: make(arguments[name]) for name, make in change.items()}
    with pytest.raises(RuntimeError, match=message):
        operators.decoder_layer(*{**arguments, **changed}.values())
    assert torch.equal(before[0], cache.keys[0]) and torch.equal(before[1], cache.values[0])
