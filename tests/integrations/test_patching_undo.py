"""`undo` of `apply_mistral_kernels` restores the original objects; shared ones never change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from support.patching_cases import (
    GEMMAS,
    LLAMAS,
    OPS,
    VOCAB,
    Operators,
    assert_identical,
    attributes,
    make,
    make_batch,
    only,
    train_step,
)

from mistral_kernels.integrations.patching import Handle, apply_mistral_kernels


@pytest.mark.parametrize("family", LLAMAS + GEMMAS)
def test_undo_restores_the_same_objects(family: str) -> None:
    model, batch = make(family), make_batch()
    expected = train_step(model, batch)
    before = attributes(model)
    handle = apply_mistral_kernels(model)
    train_step(model, batch)
    assert model.config._attn_implementation == "mistral_kernels"
    for _ in range(2):
        handle.undo()
        assert_identical(model, before)
    again = train_step(model, batch)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_shared_classes_and_functions_are_unchanged() -> None:
    module: Any = __import__("importlib").import_module(make().__module__)
    classes = {name: dict(vars(x)) for name, x in vars(module).items() if isinstance(x, type)}
    symbols = dict(vars(module))
    model, other = make(), make()
    other.config = model.config  # as for two models created from one config
    before = attributes(other)
    apply_mistral_kernels(model)
    train_step(model, make_batch())
    assert all(vars(module)[name] is value for name, value in symbols.items())
    for name, values in classes.items():
        assert all(vars(symbols[name])[key] is value for key, value in values.items()), name
    assert_identical(other, before)
    assert other.config._attn_implementation == "eager"


def test_context_manager_undoes_on_exceptions() -> None:
    model = make()
    before = attributes(model)

    def fail() -> None:
        with apply_mistral_kernels(model) as handle:
            assert isinstance(handle, Handle)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert_identical(model, before)


def test_an_exception_in_the_model_leaves_it_usable() -> None:
    model, batch = make(), make_batch()
    before = attributes(model)
    with apply_mistral_kernels(model):
        with pytest.raises(IndexError):
            model(torch.full((1, 3), VOCAB))
        train_step(model, batch)
    assert_identical(model, before)


@pytest.mark.parametrize("first", [0, 1])
def test_handles_undo_only_their_own_patches(first: int) -> None:
    model, batch = make(), make_batch()
    before = attributes(model)
    handles = [
        apply_mistral_kernels(model, **only("rms_norm")),
        apply_mistral_kernels(model, **only("rms_norm", "swiglu")),
    ]
    assert [set(handle.changed) for handle in handles] == [{"rms_norm"}, {"swiglu"}]
    third = apply_mistral_kernels(model, **only("rms_norm"))
    third.undo()
    handles[first].undo()
    with Operators() as operators:
        train_step(model, batch)
    left = OPS[["swiglu", "rms_norm"][first]]
    assert [name for name in OPS.values() if operators.counts[name]] == [left]
    handles[1 - first].undo()
    assert_identical(model, before)


def test_undo_leaves_later_replacements_unchanged() -> None:
    model, batch = make(), make_batch()
    expected = train_step(model, batch)
    handle = apply_mistral_kernels(model)
    norm = model.model.norm
    ours = norm.forward
    norm.forward = wrapper = lambda x: ours(x)
    with pytest.warns(
        UserWarning, match="MistralRMSNorm.forward: replaced after apply_mistral_kernels"
    ):
        handle.undo()
    assert norm.forward is wrapper
    again = train_step(model, batch)  # the wrapper calls our forward, which runs the original
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_set_attn_implementation_overrides_the_patch() -> None:
    model = make()
    with apply_mistral_kernels(model), Operators() as operators:
        model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "sdpa"
        train_step(model, make_batch())
    assert not operators.counts["attention_forward"]
    assert operators.counts["rotary"]
    assert model.config._attn_implementation == "sdpa"
