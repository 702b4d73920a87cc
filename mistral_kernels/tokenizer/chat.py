"""Render a chat template in the folder of a model, as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_kernels.tokenizer.arguments import check_text
from mistral_kernels.tokenizer.errors import TokenizerError, library_errors, missing_package


def render_template(
    path: Path,
    templates: Mapping[str, str],
    names: Mapping[str, str],
    messages: list[dict[str, Any]],
    *,
    chat_template: str | None,
    template_kwargs: Mapping[str, Any],
    **options: Any,
) -> str:
    """Return the text of a conversation.

    Args:
        path: File of the tokenizer.
        templates: Templates by name.
        names: Named tokens, which templates use as variables.
        messages: The conversation.
        chat_template: A template, or the name of one of `templates`. None chooses as transformers
            does.
        template_kwargs: Further variables. They replace named tokens of the same name.
        options: `tools`, `documents`, `add_generation_prompt` and `continue_final_message`.

    Raises:
        TokenizerError: There is no template, or the template raises an error.
    """
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise missing_package("the chat template of", path, "transformers", "hf") from error
    if not messages:
        raise TokenizerError("conversation must hold at least one message, got none")
    template = choose_template(path.parent, templates, chat_template, options["tools"])
    variables = {**names, **template_kwargs, "chat_template": template, **options}
    with library_errors("messages"):  # a template may raise any exception
        texts: Any = render_jinja_template(conversations=[messages], **variables)[0]
    text: str = texts[0]
    check_text("the rendered conversation", text)
    return text


def choose_template(
    folder: Path, templates: Mapping[str, str], requested: str | None, tools: Any
) -> str:
    """Return the requested template, else "tool_use" if there are tools, else "default"."""
    if requested is not None:
        check_text("chat_template", requested)
        return templates.get(requested, requested)
    if not templates:
        raise TokenizerError(
            f"{folder}: no chat template, neither chat_template.jinja nor in "
            "tokenizer_config.json; is it a base model? Set chat_template"
        )
    name = "tool_use" if tools is not None and "tool_use" in templates else "default"
    if name not in templates:
        raise TokenizerError(
            f"{folder}: several chat templates, but none is the default; chat_template must be "
            f"one of {sorted(templates)}"
        )
    return templates[name]
