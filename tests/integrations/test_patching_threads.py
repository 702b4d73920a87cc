"""A call of a model finishes as it began, whatever other threads apply and undo meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers, to be patched, is absent")

from patching_cases import VOCAB, assert_identical, attributes, make  # noqa: E402

from mistral_kernels.integrations.patching import PARTS, apply_mistral_kernels  # noqa: E402


class Pause:
    """A call of a model in another thread, held before one of its layers until it is let go."""

    def __init__(self, module: nn.Module, call: Callable[[], Tensor]) -> None:
        self.arrived, self.go = threading.Event(), threading.Event()
        self.hook = module.register_forward_pre_hook(self._wait)
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, args=(call,))
        self.thread.start()
        assert self.arrived.wait(60)
        self.hook.remove()

    def _wait(self, *_: Any) -> None:
        if threading.current_thread() is self.thread:
            self.arrived.set()
            assert self.go.wait(60)

    def _run(self, call: Callable[[], Tensor]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.result = error

    def finish(self) -> Tensor:
        self.go.set()
        self.thread.join(60)
        assert isinstance(self.result, Tensor), self.result
        return self.result


@pytest.fixture
def pure() -> Iterator[tuple[Any, Callable[[], Tensor], Tensor, Tensor]]:
    """A model, a call of it, and what the call gives on its own code and on ours: not the same."""
    model = make().bfloat16().eval()
    ids = torch.randint(1, VOCAB, (2, 17))

    def call() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    theirs = call()
    with apply_mistral_kernels(model):
        ours = call()
    assert not torch.equal(ours, theirs)
    yield model, call, theirs, ours


@pytest.mark.parametrize("place", ["model.layers.1", "model.layers.0.mlp", "lm_head", "model"])
def test_a_running_call_finishes_as_it_began(pure: Any, place: str) -> None:
    model, call, theirs, ours = pure
    before = attributes(model)
    running = Pause(model.get_submodule(place), call)
    handle = apply_mistral_kernels(model)
    assert torch.equal(call(), ours)
    assert torch.equal(running.finish(), theirs)
    assert torch.equal(call(), ours)

    running = Pause(model.get_submodule(place), call)
    handle.undo()
    assert torch.equal(call(), theirs)
    assert torch.equal(running.finish(), ours)
    assert torch.equal(call(), theirs)
    assert_identical(model, before)


def test_undone_and_applied_again_under_a_running_call(pure: Any) -> None:
    model, call, theirs, ours = pure
    before = attributes(model)
    handle = apply_mistral_kernels(model)
    running = Pause(model.model.layers[1], call)
    handle.undo()
    original = Pause(model.model.layers[1], call)
    again = apply_mistral_kernels(model)
    assert set(again.changed) == set(PARTS)
    handle.undo()
    assert torch.equal(call(), ours)
    assert torch.equal(running.finish(), ours)
    assert torch.equal(original.finish(), theirs)
    assert torch.equal(call(), ours)
    again.undo()
    assert torch.equal(call(), theirs)
    assert_identical(model, before)


def test_undo_from_inside_a_call(pure: Any) -> None:
    model, call, theirs, ours = pure
    before = attributes(model)
    handle = apply_mistral_kernels(model)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: handle.undo())
    assert torch.equal(call(), ours)
    hook.remove()
    assert torch.equal(call(), theirs)
    assert_identical(model, before)


def test_a_running_generation_finishes_as_it_began() -> None:
    """Its scores, token after token, are of one kind."""
    model = make().bfloat16().eval()
    ids = torch.randint(1, VOCAB, (2, 9))

    def call() -> Tensor:
        outputs = model.generate(
            ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        return torch.stack(outputs.scores)

    theirs = call()
    with apply_mistral_kernels(model):
        ours = call()
    assert not torch.equal(ours, theirs)
    running = Pause(model.model.layers[1], call)
    handle = apply_mistral_kernels(model)
    assert torch.equal(running.finish(), theirs)
    running = Pause(model.model.layers[1], call)
    handle.undo()
    assert torch.equal(running.finish(), ours)


def test_threads_see_one_or_the_other(pure: Any) -> None:
    model, call, theirs, ours = pure
    before = attributes(model)
    results: list[Tensor | BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                results.append(call())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        with apply_mistral_kernels(model):
            stop.wait(0.01)
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join(60)
    kinds: Counter[str] = Counter()
    for result in results:
        assert isinstance(result, Tensor), result
        assert torch.equal(result, theirs) or torch.equal(result, ours)
        kinds["theirs" if torch.equal(result, theirs) else "ours"] += 1
    assert kinds["theirs"] and kinds["ours"], kinds
    assert_identical(model, before)
