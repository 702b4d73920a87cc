"""Examples of all docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import mistral_kernels

MODULES = [
    module.name
    for module in pkgutil.walk_packages(mistral_kernels.__path__, "mistral_kernels.")
    if not module.name.endswith("__main__")
]
PUBLIC = [f"mistral_kernels.{name}" for name in mistral_kernels.__all__] + [
    "mistral_kernels.MistralForCausalLM.from_pretrained",
    "mistral_kernels.MistralForCausalLM.generate",
    "mistral_kernels.MistralTokenizer.from_pretrained",
    "mistral_kernels.MistralTokenizer.encode",
    "mistral_kernels.MistralTokenizer.decode",
    "mistral_kernels.integrations.transformers.RollingCache",
    "mistral_kernels.integrations.transformers.apply_mistral_kernels",
    "mistral_kernels.integrations.transformers.register",
    "mistral_kernels.integrations.torch_sdpa.register",
    "mistral_kernels.integrations.torch_sdpa.restore",
]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def imported(name: str) -> object:
    if name.startswith("mistral_kernels.integrations.transformers"):
        pytest.importorskip("transformers")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = imported(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        test.globs = {}  # an example imports what it uses
        output: list[str] = []
        result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=output.append)
        assert result.failed == 0, "".join(output)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_examples(name: str) -> None:
    found: object = mistral_kernels
    path = name.split(".")[1:]
    if path[0] == "integrations":
        found, path = imported(".".join(name.split(".")[:3])), path[2:]
    for part in path:
        found = getattr(found, part)
    documented = inspect.getdoc(found) or ""
    assert ">>> " in documented
    parameters = [] if inspect.isclass(found) else list(inspect.signature(found).parameters)
    described = [x for x in parameters if x not in ("self", "cls", "args", "kwargs")]
    assert not described or "Args:" in documented
