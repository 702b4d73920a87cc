"""The model's decode step in one call, bit-identical to its operators called one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import FLOATS
from torch import Tensor, nn

from mistral_kernels import MistralForCausalLM, RollingCache
from mistral_kernels.model import engine, generation, layers
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.engine import CpuEngine, Engine, ModuleEngine, engine_for
from mistral_kernels.ops.linear import KERNEL_ROWS
from mistral_kernels.ops.linear_int8 import quantize_int8
from mistral_kernels.ops.rotary import rotary_tables

CONFIG = MistralConfig(
    vocab_size=11,
    hidden_size=52,
    intermediate_size=70,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=24,
    sliding_window=(7, None, 3),
)


class Step:
    """A decode step of a random model, with a cache filled with sequences of several lengths.

    `calls` counts the steps that csrc has run.
    """

    def __init__(
        self,
        monkeypatch: Any,
        dtype: torch.dtype = torch.float32,
        batch: int = 3,
        **overrides: Any,
    ) -> None:
        self.config = config = MistralConfig(**{**vars(CONFIG), **overrides})
        self.model = MistralForCausalLM(config).to(dtype).requires_grad_(False)
        for weight in self.model.parameters():
            weight.copy_(torch.randn(weight.shape))
        self.cache = RollingCache(config, batch, 20, dtype)
        self.rings = [*self.cache.keys, *self.cache.values]
        for ring in self.rings:
            ring.normal_()
        self.token_ids = torch.randint(config.vocab_size, (batch,))
        self.monkeypatch, self.calls = monkeypatch, 0

        original = CpuEngine.step

        def counted(*args: Any) -> Tensor:
            self.calls += 1
            return original(*args)

        monkeypatch.setattr(CpuEngine, "step", counted)

    def run(self, engine: Engine | None = None) -> list[Tensor]:
        """Run one step, by `model.decode` without an engine; return the logits and the rings."""
        before = [ring.clone() for ring in self.rings]
        self.cache.host_lengths = [5 * i % 19 for i in range(self.cache.batch)]
        self.cache.lengths.copy_(torch.tensor(self.cache.host_lengths))
        if engine is None:
            logits = self.model.decode(self.token_ids, self.cache)
        else:
            logits = engine.step(self.token_ids)
        assert self.cache.lengths.tolist() == [5 * i % 19 + 1 for i in range(self.cache.batch)]
        assert self.cache.host_lengths == self.cache.lengths.tolist()
        assert not self.cache.interrupted
        after = [ring.clone() for ring in self.rings]
        for ring, old in zip(self.rings, before, strict=True):
            ring.copy_(old)
        return [logits, *after]


def assert_bit_identical(step: Step) -> None:
    with torch.no_grad():
        one_by_one = step.run(ModuleEngine(step.model, step.cache))
        assert step.calls == 0
        for selected in (None, engine_for(step.model, step.cache)):
            for a, b in zip(step.run(selected), one_by_one, strict=True):
                assert a.isfinite().all()
                assert torch.equal(a, b)
    assert step.calls == 2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batch", [1, 3, KERNEL_ROWS])
@pytest.mark.parametrize("num_hidden_layers", [1, 3])
def test_same_bits(num_hidden_layers, batch, dtype, operators, monkeypatch):
    windows = CONFIG.sliding_window[:num_hidden_layers]
    sizes = {"num_hidden_layers": num_hidden_layers, "sliding_window": windows}
    assert_bit_identical(Step(monkeypatch, dtype, batch, **sizes))


@pytest.mark.parametrize("window", [None, 1, 64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_windows_and_threads(window, threads, operators, monkeypatch):
    torch.set_num_threads(threads)
    sizes = {"sliding_window": window, "hidden_size": 512, "intermediate_size": 1024}
    assert_bit_identical(Step(monkeypatch, torch.bfloat16, 2, **sizes))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8(dtype, operators, monkeypatch):
    """Half of the projections have int8 weights, then all of them."""
    step = Step(monkeypatch, dtype)
    quantized = [x for x in step.model.modules() if isinstance(x, layers.Linear)]
    for part in (quantized[::2], quantized[1::2]):
        for module in part:
            weight, module.scales = quantize_int8(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
        step.calls = 0
        assert_bit_identical(step)


def replace_module(model: MistralForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj = nn.Linear(70, 52, bias=False)


def wrap_module(model: MistralForCausalLM) -> None:
    attention = model.model.layers[2].self_attn
    attention.qkv_proj = nn.Sequential(attention.qkv_proj)


def hook_projection(model: MistralForCausalLM) -> None:
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *args: None)


def hook_layer_input(model: MistralForCausalLM) -> None:
    model.model.layers[2].register_forward_pre_hook(lambda *args: None)


def hook_norm(model: MistralForCausalLM) -> None:
    model.model.norm.register_forward_hook(lambda *args: None)


def hook_model(model: MistralForCausalLM) -> None:
    model.model.register_forward_hook(lambda *args: None)


def hook_embedding(model: MistralForCausalLM) -> None:
    model.model.embed_tokens.register_forward_hook(lambda *args: None)


def set_embedding_max_norm(model: MistralForCausalLM) -> None:
    model.model.embed_tokens.max_norm = 1.0


def hook_head(model: MistralForCausalLM) -> None:
    model.lm_head.register_forward_pre_hook(lambda *args: None)


def replace_head(model: MistralForCausalLM) -> None:
    model.lm_head = nn.Linear(52, 11, bias=False)


def override_forward(model: MistralForCausalLM) -> None:
    attention = model.model.layers[1].self_attn
    original = attention.forward
    attention.forward = lambda *args: original(*args)


def replace_weight(model: MistralForCausalLM) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight = _Weight(norm.weight.detach(), requires_grad=False)


class _Weight(nn.Parameter):
    pass


def change_eps(model: MistralForCausalLM) -> None:
    model.model.layers[1].post_attention_layernorm.eps = 1e-3


@pytest.mark.parametrize(
    "change",
    [
        *(replace_module, wrap_module, replace_head, override_forward, replace_weight, change_eps),
        *(hook_projection, hook_layer_input, hook_norm, hook_model, hook_embedding, hook_head),
        set_embedding_max_norm,
    ],
)
def test_modified_modules_are_called(change, monkeypatch):
    step = Step(monkeypatch)
    change(step.model)
    with torch.no_grad():
        step.run()
        assert step.calls == 0
        assert type(engine_for(step.model, step.cache)) is ModuleEngine


def test_global_hooks_are_called(monkeypatch):
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    step = Step(monkeypatch)
    try:
        with torch.no_grad():
            step.run()
    finally:
        hook.remove()
    assert step.calls == 0
    assert step.model.model.layers[0].mlp in seen


def test_replaced_forward_of_a_class_is_called(monkeypatch):
    step = Step(monkeypatch)
    monkeypatch.setattr(layers.MLP, "forward", lambda self, x: torch.zeros_like(x))
    with torch.no_grad():
        zeros = step.run()[0]
        monkeypatch.undo()
        assert not torch.equal(step.run()[0], zeros)
    assert step.calls == 0


def test_generation_selects_its_engine_once(operators, monkeypatch):
    """A hook that is added during generation takes effect in the next call."""
    step, selections = Step(monkeypatch), []
    original = generation.engine_for
    monkeypatch.setattr(
        generation, "engine_for", lambda *args: selections.append(1) or original(*args)
    )
    steps = step.model.stream([[1, 2], [3], [4]], max_new_tokens=5)
    next(steps)
    hook_norm(step.model)
    assert len(list(steps)) == 4
    assert (len(selections), step.calls) == (1, 4)
    list(step.model.stream([[1, 2], [3], [4]], max_new_tokens=5))
    assert (len(selections), step.calls) == (2, 4)


@pytest.mark.parametrize(
    "options", [{"batch": KERNEL_ROWS + 1}, {"head_dim": 12}, {"dtype": torch.float64}], ids=str
)
def test_unsupported_models_run_module_by_module(options, monkeypatch):
    step = Step(monkeypatch, **options)
    with torch.no_grad():
        step.run()
    assert step.calls == 0


def test_gradients_run_the_modules(monkeypatch):
    step = Step(monkeypatch)
    step.model.requires_grad_(True)
    logits, *_ = step.run()
    assert logits.requires_grad
    assert step.calls == 0


def test_autocast_does_not_change_a_step(operators, monkeypatch):
    step = Step(monkeypatch)
    with torch.no_grad():
        logits, *_ = step.run()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(step.run()[0], logits)
    assert step.calls == 2


def test_strided_and_int32_tokens(operators, monkeypatch):
    step = Step(monkeypatch)
    with torch.no_grad():
        logits, *_ = step.run()
        apart = step.token_ids.repeat_interleave(2)[::2]
        for step.token_ids, calls in ((apart, 2), (apart.int(), 3)):
            assert torch.equal(step.run()[0], logits)
            assert step.calls == calls


def test_refused_step_leaves_the_cache_usable(operators, monkeypatch):
    step = Step(monkeypatch)
    with torch.no_grad():
        expected = step.run()
        good, step.token_ids = step.token_ids, torch.tensor([1, 11, 2])
        with pytest.raises(RuntimeError, match=r"token_ids must be in \[0, 11\), got 11"):
            step.run()
        assert not step.cache.interrupted
        step.token_ids = good
        for a, b in zip(step.run(), expected, strict=True):
            assert torch.equal(a, b)
    assert step.calls == 3


WEIGHTS = ("embedding", "weights", "norm", "head", "head_scales", "windows_left", "head_dim", "eps")


def weights_of(step: Step) -> dict[str, Any]:
    """Return the arguments of csrc's `make_decoder`."""
    return dict(zip(WEIGHTS, engine.decoder_arguments(step.model), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": lambda x: x[:, 1:]}, "embedding must be contiguous"),
        ({"embedding": lambda x: x[0]}, "weight matrices must have 2 dimensions"),
        (
            {"embedding": lambda x: x.double()},
            "embedding must be float32, float16 or bfloat16, got float64",
        ),
        ({"head": lambda x: x[1:]}, r"head must be \(11, 52\)"),
        ({"head": lambda x: x.char()}, "head must be float32, got int8"),
        ({"head_scales": lambda _: torch.ones(11)}, "head must be int8, got float32"),
        ({"norm": lambda x: x.half()}, "norm must be float32, got float16"),
        (
            {"windows_left": lambda x: x[1:]},
            "weights must have 10 entries per entry of windows_left",
        ),
        ({"head_dim": lambda _: 12}, "head_dim must be a positive multiple of 8, got 12"),
        ({"head_dim": lambda _: 144}, "query heads must be a positive multiple of"),
        ({"weights": lambda x: x[10:]}, "weights must have 10 entries per entry of windows_left"),
        ({"weights": lambda x: [*x[:28], x[28][:-1], None]}, r"down must be \(52, 70\)"),
        ({"weights": lambda x: [*x[:28], x[28][:, 1:], None]}, r"down must be \(52, 70\)"),
        (
            {"weights": lambda x: [*x[:28], None, None]},
            "weights must be tensors, got None at index 8 of a layer; only scales",
        ),
        ({"weights": lambda x: [x[0], x[1][:, 1:], *x[2:]]}, r"qkv must be \(240, 52\)"),
        (
            {"weights": lambda x: [*x[:3], x[3][:, 24:], *x[4:]]},
            "query heads must be a positive multiple of",
        ),
        (
            {"weights": lambda x: [*x[:5], x[5].half(), *x[6:]]},
            "mlp_norm must be float32, got float16",
        ),
    ],
)
def test_bad_weights(change, message, operators, monkeypatch):
    given = weights_of(Step(monkeypatch))
    changed = {name: make(given[name]) for name, make in change.items()}
    with pytest.raises(RuntimeError, match=message):
        operators.make_decoder(*{**given, **changed}.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": lambda x: x + 100}, r"lengths must be in \[0, 20\), got 100"),
        ({"lengths": lambda x: x.long()}, "lengths must be int32, got int64"),
        ({"k_caches": lambda x: [*x[:-1], x[-1][:2]]}, r"k_cache must be \(3, capacity, 2"),
        ({"v_caches": lambda x: [*x[:-1], x[-1][:, 1:]]}, r"v_cache must be \(3, capacity, "),
        (
            {"v_caches": lambda x: [x[0].double(), *x[1:]]},
            "v_cache must be float32, got float64",
        ),
        ({"k_caches": lambda x: [x[0].mT.contiguous().mT, *x[1:]]}, "k_cache must be contiguous"),
        (
            {"k_caches": lambda x: [x[0][0], *x[1:]]},
            r"k_cache must be \(3, capacity, 2, 24",
        ),
        (
            {"k_caches": lambda x: x[1:]},
            "k_caches and v_caches must have one cache for each of 3 layers",
        ),
        ({"token_ids": lambda x: x - 9}, r"token_ids must be in \[0, 11\), got -"),
        ({"token_ids": lambda x: x.int()}, "token_ids must be int64, got int32"),
        ({"logits": lambda x: x[:, :-1].contiguous()}, r"logits must be \(3, 11\)"),
        ({"logits": lambda x: x[0]}, r"logits must be \(3, 11\)"),
        ({"cos": lambda x: x[:, 1:]}, r"cos must be \(20, 12\)"),
        ({"sin": lambda x: x[1:]}, r"sin must be \(20, 12\)"),
        (
            {"decoder": lambda x: x + 1000},
            "decoder must be the number of an existing decoder, got 1",
        ),
    ],
)
def test_bad_arguments(change, message, operators, monkeypatch):
    step = Step(monkeypatch)
    cache = step.cache
    cos, sin = rotary_tables(20, 24, 1e4)
    arguments = {
        "decoder": operators.make_decoder(*weights_of(step).values()),
        "token_ids": step.token_ids,
        "cos": cos,
        "sin": sin,
        "k_caches": cache.keys,
        "v_caches": cache.values,
        "lengths": cache.lengths,
        "logits": torch.empty(3, 11),
    }
    written = [*step.rings, cache.lengths]
    before = [x.clone() for x in written]
    changed = {name: make(arguments[name]) for name, make in change.items()}
    with pytest.raises(RuntimeError, match=message):
        operators.decoder_step(*{**arguments, **changed}.values())
    assert all(map(torch.equal, before, written))


def test_engine_owns_its_weights(operators, monkeypatch):
    """The engine keeps its own references to the weights, and releases them when it is deleted."""
    step = Step(monkeypatch)
    with torch.no_grad():
        expected = step.run()
        selected = engine_for(step.model, step.cache)
        for weight in step.model.parameters():
            weight.data = torch.full_like(weight, torch.nan)
        for a, b in zip(step.run(selected), expected, strict=True):
            assert torch.equal(a, b)
        number = selected._number
        del selected
        with pytest.raises(RuntimeError, match=f"of an existing decoder, got {number}"):
            operators.decoder_step(number, *[step.token_ids] * 3, [], [], *[step.token_ids] * 2)
