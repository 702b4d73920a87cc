"""Snippets of model cards, with only the import changed, print the text of transformers."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="device_map of transformers needs accelerate")

from support.model_cards import SNIPPETS  # noqa: E402
from support.model_folders import FAMILIES  # noqa: E402

# Classes and functions that this package offers under the names of transformers.
OFFERED = {
    *("AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "MistralForCausalLM"),
    "pipeline",
}


def local(snippet: str, folder_of: Callable[[str], Path], settings: dict[str, Any]) -> str:
    """Replace the hub ids by folders and the GPU by the CPU; write each generation_config.json.

    Args:
        snippet: the code.
        folder_of: maps a hub id to its folder.
        settings: contents of generation_config.json in addition to the token ids.
    """
    for hub_id in FAMILIES:
        if f'"{hub_id}"' in snippet:
            folder = folder_of(hub_id)
            snippet = snippet.replace(f'"{hub_id}"', repr(str(folder)))
            config = json.loads((folder / "config.json").read_text())
            tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
            (folder / "generation_config.json").write_text(json.dumps(tokens | settings))
    return re.sub(r'"cuda(:0)?"', '"cpu"', snippet).replace(".cuda()", ".cpu()")


def greedy(snippet: str) -> str:
    """Replace sampling by the most likely token, and 16-bit weights by float32.

    At most 24 tokens are generated.
    """
    snippet = re.sub(r'(do_sample"?[=:] ?)True', r"\1False", snippet)
    snippet = re.sub(r"num_return_sequences=\d+", "num_return_sequences=1", snippet)
    snippet = re.sub(r'(max_new_tokens"? ?[=:] ?)\d{2,}', r"\g<1>24", snippet)
    return re.sub(r"torch\.b?float16", "torch.float32", snippet)


def with_import_changed(snippet: str) -> str:
    """Import what this package offers from this package, and the rest from transformers."""

    def split(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[1].split(",")]
        parts = {
            "mistral_kernels": [name for name in names if name in OFFERED],
            "transformers": [name for name in names if name not in OFFERED],
        }
        return "\n".join(f"from {p} import {', '.join(part)}" for p, part in parts.items() if part)

    changed = re.sub(r"^from transformers import (.+)$", split, snippet, flags=re.MULTILINE)
    changed = re.sub(
        r"^import transformers$", "import mistral_kernels as transformers", changed, flags=re.M
    )
    assert changed != snippet
    return changed


def for_transformers(code: str) -> str:
    """Replace the arguments that transformers 5 refuses, or that require flash-attn."""
    code = code.replace('"flash_attention_2"', '"sdpa"')
    code = re.sub(r" *load_in_[48]bit=False,\n", "", code)
    # Cards for transformers 4 pass this result to generate, where transformers 5 requires a tensor.
    tensor = '(messages, return_tensors="pt")'
    return code.replace(tensor, f"{tensor[:-1]}, return_dict=False)")


def printed(code: str, name: str) -> str:
    """Run the code and return what it prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, name, "exec"), {"__name__": name})
    return out.getvalue()


@contextmanager
def smallest_gap() -> Iterator[list[float]]:
    """Record the smallest relative difference of the two largest logits per forward pass."""
    gaps: list[float] = []

    def record(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, transformers.MistralForCausalLM):
            first, second = output.logits[:, -1].topk(2).values.unbind(-1)
            gaps.append(((first - second) / first.abs()).min().item())

    handle = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        yield gaps
    finally:
        handle.remove()


@pytest.mark.parametrize("name", SNIPPETS)
def test_greedy_text_is_that_of_transformers(name: str, folder_of: Callable[[str], Path]) -> None:
    settings = {"do_sample": False, "max_new_tokens": 24}
    code = greedy(local(SNIPPETS[name], folder_of, settings))
    with smallest_gap() as gaps:
        expected = printed(for_transformers(code), f"<{name} with transformers>")
    assert len(expected) > 20
    assert min(gaps) > 2e-5, "rounding must not decide; change the prompt"
    assert printed(with_import_changed(code), f"<{name}>") == expected


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs_as_written(name: str, folder_of: Callable[[str], Path]) -> None:
    """Run with the sampling and the dtype that the snippet requests."""
    code = with_import_changed(local(SNIPPETS[name], folder_of, {"max_new_tokens": 40}))
    assert printed(code, f"<{name}>").strip()
