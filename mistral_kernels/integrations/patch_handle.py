"""Handle of a patched transformers model, and the record of one replaced attribute."""

from __future__ import annotations

import re
import warnings
import weakref
from typing import Any, NamedTuple

from torch import nn

PARTS = ("attention", "rms_norm", "rotary", "swiglu", "cross_entropy")
ABSENT: Any = object()  # the value of an attribute that a module does not have


class Patch(NamedTuple):
    """One replaced attribute.

    Attributes:
        handle: says whether the patch is on.
        ours: the function or the config that replaces.
        original: the function or the config that serves when the patch is off.
        replaced: the value of the attribute before; `ABSENT` if there was none.
    """

    handle: Handle
    ours: Any
    original: Any
    replaced: Any


def patch_of(value: Any) -> Patch | None:
    """Return the patch that put `value`, an attribute of a module, there."""
    patch: Patch | None = getattr(value, "_mistral_kernels_patch", None)
    # Wrappers take over the attributes of the function that they wrap.
    if patch is None or patch.ours is not getattr(value, "__func__", value):
        return None
    return patch


class Handle:
    """Handle of a patched model. `repr` lists the changes; as a context manager it ends in `undo`.

    Attributes:
        on: whether the kernels serve.
        changed: names of the changed modules, by part.
        skipped: the reasons for what is not changed, by part.
    """

    def __init__(self, model: str) -> None:
        self.on = False
        self.changed: dict[str, list[str]] = {}
        self.skipped: dict[str, list[str]] = {}
        self._model = model
        self._replaced: list[tuple[weakref.ref[nn.Module], str]] = []

    def undo(self) -> None:
        """Put back what was there before, the very same objects. A second call does nothing.

        An attribute that somebody else has replaced since stays as it is, with a warning.
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
                f"{', '.join(sorted(set(replaced)))}: replaced after apply_mistral_kernels, in "
                f"{len(replaced)} places; undo leaves them so",
                stacklevel=2,
            )

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Replace an attribute of a module, until `undo`."""
        vars(module)[name] = value
        self._replaced.append((weakref.ref(module), name))

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __reduce__(self) -> Any:
        """Pickle a handle that is off, with the forwards that cloudpickle pickles by value."""
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
    """Return names without repetition: model.layers.*.mlp for the mlp of all layers."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
