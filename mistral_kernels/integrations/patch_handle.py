"""Handle of a patched transformers model, and the record of one replaced attribute."""

from __future__ import annotations

import re
import warnings
import weakref
from typing import Any, NamedTuple

from torch import nn

PARTS = ("attention", "rms_norm", "rotary", "swiglu", "cross_entropy")
ABSENT: Any = object()  # marks an attribute that the module did not have


class Patch(NamedTuple):
    """Record of one replaced attribute.

    Attributes:
        handle: handle of the patched model; the patch is active while `handle.on` is True.
        ours: function or config that replaces the original.
        original: function or config that runs after `undo`.
        replaced: value of the attribute before the patch; `ABSENT` if there was none.
    """

    handle: Handle
    ours: Any
    original: Any
    replaced: Any


def patch_of(value: Any) -> Patch | None:
    """Return the patch that set `value`, an attribute of a module; None if no patch set it."""
    patch: Patch | None = getattr(value, "_mistral_kernels_patch", None)
    # functools.wraps copies this attribute to wrappers of our function; no patch set the wrappers.
    if patch is None or patch.ours is not getattr(value, "__func__", value):
        return None
    return patch


class Handle:
    """Handle of a patched model. `repr` lists the changes; leaving its `with` block calls `undo`.

    Attributes:
        on: whether the model runs the kernels; `undo` sets it to False.
        changed: names of the patched modules, by part ("attention", "rms_norm", ...).
        skipped: reasons why modules were not patched, by part.
    """

    def __init__(self, model: str) -> None:
        self.on = False
        self.changed: dict[str, list[str]] = {}
        self.skipped: dict[str, list[str]] = {}
        self._model = model
        self._replaced: list[tuple[weakref.ref[nn.Module], str]] = []

    def undo(self) -> None:
        """Restore the original objects. A second call does nothing.

        An attribute that other code has replaced after the patch is left unchanged, with a warning.
        """
        if not self.on:
            return
        self.on = False
        replaced = []
        for reference, name in self._replaced:
            module = reference()
            if module is None:
                continue
            patch = patch_of(vars(module).get(name))
            if patch is None or patch.handle is not self:
                replaced.append(f"{type(module).__name__}.{name}")
            elif patch.replaced is ABSENT:
                del vars(module)[name]
            else:
                vars(module)[name] = patch.replaced
        if replaced:
            warnings.warn(
                f"{', '.join(sorted(set(replaced)))}: replaced after apply_mistral_kernels "
                f"({len(replaced)} attributes); undo leaves them unchanged",
                stacklevel=2,
            )

    def replace(self, module: nn.Module, name: str, value: Any) -> None:
        """Replace an attribute of a module until `undo`."""
        vars(module)[name] = value
        self._replaced.append((weakref.ref(module), name))

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __reduce__(self) -> Any:
        """Pickle the handle as undone: cloudpickle pickles it together with patched forwards."""
        return Handle, (self._model,)

    def __repr__(self) -> str:
        lines = [f"mistral_kernels in {self._model}{'' if self.on else ', undone'}:"]
        for part in PARTS:
            names = self.changed.get(part, [])
            if names:
                lines.append(f"  {part}: {len(names)} changed: {', '.join(_grouped(names))}")
            lines += [f"  {part}: skipped: {reason}" for reason in self.skipped.get(part, [])]
        return "\n".join(lines)


def _grouped(names: list[str]) -> list[str]:
    """Return the names with layer indices replaced by `*`, without duplicates."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
