"""Attributes of modules replaced for the calls that want it, and put back when none needs them.

A call of a model, a whole `generate` too, is served in one way from its first layer to its last,
whatever other threads switch meanwhile. The models' `forward` and `generate` are doors: a call that
comes in keeps the parts that were on then, in a context variable. A replaced method asks its gate;
called by itself, or by a backward pass that recomputes, it goes by the parts that are on now. What
is off but still in use by calls inside is put back when the last of them leaves.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import CodeType, FrameType, MappingProxyType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mistral_kernels.integrations.patched_modules import Forward, loss_forward

_ATTRIBUTE = "_mistral_kernels_gate"
_ABSENT: Any = object()

# The parts that serve the calls which the running code is inside of.
_calls: ContextVar[Mapping[Gate, frozenset[str]]] = ContextVar(
    "mistral_kernels_calls", default=MappingProxyType({})
)
# Whether the doors that were made, dead ones aside, lead to the loss.
_serve_loss: WeakKeyDictionary[Forward, bool] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Patch:
    """An attribute of a module: what it is now, and what it was."""

    module: nn.Module
    name: str
    ours: Any
    original: Any

    @classmethod
    def put(cls, module: nn.Module, name: str, ours: Any) -> Patch:
        patch = cls(module, name, ours, vars(module).get(name, _ABSENT))
        vars(module)[name] = ours
        return patch

    def is_in_place(self) -> bool:
        return vars(self.module).get(self.name, _ABSENT) is self.ours

    def restore(self) -> None:
        if self.original is _ABSENT:
            del vars(self.module)[self.name]
        else:
            vars(self.module)[self.name] = self.original


def method_of(module: nn.Module, name: str) -> tuple[str, Forward]:
    """The attribute in which a module keeps a method, and the function in it, `self` first."""
    # Where accelerate has hooked a module, the hook's forward calls this one.
    slot = "_old_forward" if name == "forward" and "_old_forward" in vars(module) else name
    method = getattr(module, slot)
    if isinstance(method, MethodType) and method.__self__ is module:
        return slot, method.__func__
    return slot, functools.wraps(method)(lambda self, *args, **kwargs: method(*args, **kwargs))


def can_serve_loss(model: nn.Module) -> bool:
    """Whether its forward is transformers' own, or Liger's: a wrapper must not be lost."""
    _, forward = method_of(model, "forward")
    if forward in _serve_loss:
        return _serve_loss[forward]
    home = forward.__module__
    is_own = forward is type(model).forward and home.startswith("transformers.")
    return is_own or home.startswith("liger_kernel.")


class Gate:
    """Which parts are on in one model, and which of them serve the running call."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.on: frozenset[str] = frozenset()
        self.patches: dict[str, list[Patch]] = {}  # by part
        self.lock = threading.RLock()
        self._inside: Counter[str] = Counter()  # calls that a part serves just now
        self._doors: list[Patch] = []
        self._door_codes: set[CodeType] = set()

    @classmethod
    def of(cls, base: nn.Module) -> Gate:
        gate = vars(base).get(_ATTRIBUTE)
        return gate if gate is not None and gate.base is base else cls(base)

    def __deepcopy__(self, memo: Any) -> Gate:
        return self  # a copied model goes by the original's gate, until it is given its own

    def serves(self, part: str) -> bool:
        if torch.compiler.is_compiling():
            return part in self.on
        parts = _calls.get().get(self)
        return part in (self._new_call() if parts is None else parts)

    @contextmanager
    def call(self) -> Iterator[frozenset[str]]:
        """Yields the parts that serve the call; a call within a call is served as that one is."""
        calls = _calls.get()
        if self in calls:
            yield calls[self]
            return
        with self.lock:
            parts = self._new_call()
            self._inside.update(parts)
        token = _calls.set({**calls, self: parts})
        try:
            yield parts
        finally:
            _calls.reset(token)
            with self.lock:
                self._inside.subtract(parts)
                self._put_back()

    def _new_call(self) -> frozenset[str]:
        """What is on; but nothing within a call that came in before the doors were there."""
        on = self.on  # what another thread switches on from here, is for the next call
        frame: FrameType | None = sys._getframe(1) if on else None
        while frame is not None:
            if frame.f_code in self._door_codes:
                owner = frame.f_locals.get(frame.f_code.co_varnames[0])
                if any(door.module is owner for door in self._doors):
                    return frozenset()
            frame = frame.f_back
        return on

    def replaced(self, part: str) -> int:
        """How many of a part's patches somebody has replaced since."""
        patches = self.patches[part] or [door for door in self._doors if door.name != "generate"]
        return sum(not patch.is_in_place() for patch in patches)

    def switch_on(self, patches: dict[str, list[Patch]], models: Iterable[nn.Module]) -> None:
        """Parts whose patches are put. Until the last line all calls are served as before."""
        self.patches.update(patches)
        vars(self.base)[_ATTRIBUTE] = self
        have_doors = {door.module for door in self._doors}
        for model in models:
            if model not in have_doors:
                self._hang_doors(model)
        self.on = self.on.union(patches)

    def _hang_doors(self, model: nn.Module) -> None:
        for name in ("forward", "generate"):
            if hasattr(model, name):  # a base model generates nothing
                slot, original = method_of(model, name)
                code = getattr(inspect.unwrap(original), "__code__", None)
                if code is not None and code.co_varnames:
                    self._door_codes.add(code)
                is_loss = name == "forward" and hasattr(model, "lm_head") and can_serve_loss(model)
                loss = loss_forward(original) if is_loss else None
                door = MethodType(_door(self, original, loss), model)
                self._doors.append(Patch.put(model, slot, door))

    def switch_off(self, parts: Iterable[str]) -> None:
        with self.lock:
            self.on = self.on.difference(parts)
            if not self.on:
                _restore(self._doors)
                self._doors, self._door_codes = [], set()
            self._put_back()

    def _put_back(self) -> None:
        unused = [part for part in self.patches if part not in self.on and not self._inside[part]]
        patches = [patch for part in unused for patch in self.patches.pop(part)]
        if not self.on and not self.patches:
            vars(self.base).pop(_ATTRIBUTE, None)
        _restore(patches)


def _restore(patches: list[Patch]) -> None:
    """What somebody else has put in the place of ours since stays."""
    replaced = [patch for patch in patches if not patch.is_in_place()]
    for patch in patches:
        if patch not in replaced:
            patch.restore()
    if replaced:
        names = sorted({f"{type(x.module).__name__}.{x.name}" for x in replaced})
        warnings.warn(
            f"{', '.join(names)}: replaced after apply_mistral_kernels, in {len(replaced)} places; "
            "undo leaves them so",
            stacklevel=4,
        )


def _door(gate: Gate, original: Forward, loss: Forward | None) -> Forward:
    def serve(parts: frozenset[str]) -> Forward:
        return loss if loss and "cross_entropy" in parts else original

    @functools.wraps(original)
    def door(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return serve(gate.on)(self, *args, **kwargs)
        with gate.call() as parts:
            return serve(parts)(self, *args, **kwargs)

    _serve_loss[door] = loss is not None
    return door
