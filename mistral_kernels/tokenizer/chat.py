"""Render a chat template in the folder of a model, as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_kernels.tokenizer.arguments import check_text
from mistral_kernels.tokenizer.errors import TokenizerError, library_errors, missing_package

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
        path: File of the tokenizer.
        files: Contents of the files that accompany it, including the templates.
        names: Named tokens, which templates use as variables.
        messages: The conversation.
        chat_template: A template, or the name of one in `files`. None chooses as transformers does.
        options: `tools`, `documents` and `add_generation_prompt`.

    Raises:
        TokenizerError: There is no template, or the template raises an error.
    """
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise missing_package("the chat template of", path, "transformers", "hf") from error
    if not messages:
        raise TokenizerError("messages must hold at least one message, got none")
    template = _choose_template(path.parent, files.templates, chat_template, options["tools"])
    variables: dict[str, Any] = {"chat_template": template, **options, **names}
    with library_errors("messages"):  # a template may raise any exception
        texts: Any = render_jinja_template(conversations=[messages], **variables)[0]
    text: str = texts[0]
    check_text("the rendered conversation", text)
    return text


def _choose_template(
    folder: Path, templates: Mapping[str, str], requested: str | None, tools: Any
) -> str:
    """Return the requested template, else "tool_use" if there are tools, else "default"."""
    if requested is not None:
        check_text("chat_template", requested)
        return templates.get(requested, requested)
    if not templates:
        raise TokenizerError(
            f"{folder}: no chat template, neither chat_template.jinja nor in "
            "tokenizer_config.json; is it a base model?"
        )
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name not in templates:
        raise TokenizerError(
            f"{folder}: several chat templates, but none is the default; chat_template must be "
            f"one of {sorted(templates)}"
        )
    return templates[name]
