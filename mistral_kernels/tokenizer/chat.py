"""Render a folder's own chat template, as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_kernels.tokenizer.base import (
    TokenizerError,
    check_text,
    library_errors,
    missing_package,
)

if TYPE_CHECKING:
    from mistral_kernels.checkpoint.tokenizer_files import TokenizerFiles


def render_template(
    path: Path,
    files: TokenizerFiles,
    names: Mapping[str, str],
    messages: list[dict[str, Any]],
    *,
    chat_template: str | None,
    **options: Any,
) -> str:
    """Return the text of a conversation.

    Args:
        path: the tokenizer's file.
        files: the files beside it, with the templates.
        names: named tokens, which templates have as variables.
        messages: the conversation.
        chat_template: a template, or the name of one in `files`. None: as transformers chooses.
        options: `tools`, `documents` and `add_generation_prompt`.

    Raises:
        TokenizerError: no template, or an error of the template.
    """
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise missing_package("the chat template of", path, "transformers", "hf") from error
    if not messages:
        raise TokenizerError("messages must hold at least one message, got none")
    template = _choose_template(path.parent, files.templates, chat_template, options["tools"])
    variables: dict[str, Any] = {"chat_template": template, **options, **names}
    with library_errors("messages"):  # a template can fail in any way that Python can
        texts: Any = render_jinja_template(conversations=[messages], **variables)[0]
    text: str = texts[0]
    check_text("the rendered conversation", text)
    return text


def _choose_template(
    folder: Path, templates: Mapping[str, str], wanted: str | None, tools: Any
) -> str:
    if wanted is not None:
        check_text("chat_template", wanted)
        return templates.get(wanted, wanted)
    if not templates:
        raise TokenizerError(
            f"{folder}: no chat template, neither chat_template.jinja nor in "
            "tokenizer_config.json; is it a base model?"
        )
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name not in templates:
        raise TokenizerError(
            f"{folder}: several chat templates and none is the default: pass chat_template="
            f" with one of {sorted(templates)}"
        )
    return templates[name]
