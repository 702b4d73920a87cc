"""Encode conversations with the chat template of a model, as in transformers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mistral_kernels.tokenizer.arguments import check_choice, check_text
from mistral_kernels.tokenizer.chat import choose_template
from mistral_kernels.tokenizer.encoding import UNSUPPORTED, Encoder
from mistral_kernels.tokenizer.errors import TokenizerError
from mistral_kernels.tokenizer.output import truncate
from mistral_kernels.utils.unsupported import Unsupported, check_unsupported

_UNSUPPORTED = {
    "return_assistant_tokens_mask": Unsupported(
        (None, False), "encode the conversation without and with the answer, and compare lengths"
    ),
    "sanitize_control_tokens": UNSUPPORTED["sanitize_control_tokens"],
}


class ChatEncoder(Encoder):
    """Encoder of conversations; `MistralTokenizer` documents the attributes."""

    chat_version: str | None

    @abstractmethod
    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]:
        """Return the token ids and the text of a conversation."""

    @property
    def has_chat_template(self) -> bool:
        """True if the files appear to be those of an Instruct model.

        If the folder has a tokenizer_config.json or a chat template: whether there is a template.
        Otherwise the vocabulary and the name of the file decide, but base and Instruct models may
        share a file. The value is False for the plain `tokenizer.model` of Mistral-7B v0.1 and
        v0.2, and True for that of v0.3.
        """
        if self._files.has_config or self._templates:
            return bool(self._templates)
        bare_v1 = self.chat_version == "v1" and self.path.name == "tokenizer.model"
        return self.chat_version is not None and not bare_v1

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Chat template in the folder: its text, or the texts by name if there are several."""
        if self._templates.keys() <= {"default"}:
            return self._templates.get("default")
        return dict(self._templates)

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        templates = template if isinstance(template, dict) else {"default": template}
        for text in templates.values():
            if text is not None:
                check_text("chat_template", text)
        self._check_template_settable()
        self._templates = {name: text for name, text in templates.items() if text is not None}
        self._changes["chat_template"] = True
        self.__dict__["chat_version"] = "jinja" if self._templates else None

    @abstractmethod
    def _check_template_settable(self) -> None:
        """Raise TokenizerError if the tokenizer does not render the templates of the folder."""

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Return the text of the template that `apply_chat_template` uses with these arguments."""
        return choose_template(self.path.parent, self._templates, chat_template, tools)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **template_kwargs: Any,
    ) -> Any:
        """Render a conversation, or several, with the chat template of the model.

        A template in a folder is code. The sandbox of jinja denies it access to files and the
        network, but does not limit its time and memory.

        Args:
            conversation: The messages, `[{"role": "user", "content": "..."}, ...]`, or a list of
                several conversations. A key whose value is None counts as absent.
            tools: Functions that the model may call, as JSON schemas.
            documents: Documents that the model may quote; only for a template in a folder.
            chat_template: A template, or the name of one of several templates in the folder; only
                for a template in a folder.
            add_generation_prompt: Whether to end where the answer of the assistant begins.
                Mistral's own templates always end there. With these templates, False has one
                effect: the last message may be an answer of the assistant, as in training data.
            continue_final_message: Whether the last message is the beginning of an answer, which
                the model continues. Cannot be combined with `add_generation_prompt`.
            tokenize: Whether to return token ids. False returns the text, which is meant for
                reading only: `encode` of it may return other ids.
            padding: See `__call__`, also for `truncation` and `max_length`.
            truncation: Whether to truncate to `max_length`.
            max_length: Number of tokens.
            return_tensors: "pt" returns int64 tensors `(batch, n)`, "np" arrays, None lists.
            return_dict: Whether to return a `TokenizerOutput`, as transformers 5 does, or its
                `input_ids`, as transformers 4 did.
            tokenizer_kwargs: Further options of `__call__`, such as `padding_side`.
            template_kwargs: Further variables of a template in a folder.

        Returns:
            A `TokenizerOutput`, the token ids, or the text; a list for several conversations.

        Raises:
            TokenizerError: There is no template, a role is unknown or out of order, or the template
                raises another error.
            NotImplementedError: An argument of transformers is not supported.
        """
        check_choice("add_generation_prompt", add_generation_prompt, (True, False))
        check_choice("continue_final_message", continue_final_message, (True, False))
        if add_generation_prompt and continue_final_message:
            raise TokenizerError(
                "continue_final_message must be False with add_generation_prompt=True, got True"
            )
        refused = {k: template_kwargs.pop(k) for k in list(template_kwargs) if k in _UNSUPPORTED}
        check_unsupported("apply_chat_template", refused, _UNSUPPORTED)
        lengths = {"padding": padding, "truncation": truncation, "max_length": max_length}
        batch = self._options(**lengths, return_tensors=return_tensors, **(tokenizer_kwargs or {}))
        conversation = _list("conversation", conversation)
        is_batch = bool(conversation) and isinstance(conversation[0], (list, tuple))
        rendered = [
            self._chat(
                _check_messages(messages),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                template_kwargs=template_kwargs,
            )
            for messages in (conversation if is_batch else [conversation])
        ]
        if not tokenize:
            return [text for _, text in rendered] if is_batch else rendered[0][1]
        rows = [truncate(ids, [], [], batch.limit, self.truncation_side) for ids, _ in rendered]
        output = self._collate(rows, batch, is_batch)
        return output if return_dict else output["input_ids"]


def _list(name: str, items: Any) -> list[Any]:
    """Return `items` as a list; raise TokenizerError if they cannot be messages."""
    if isinstance(items, (str, Mapping)) or not isinstance(items, Iterable):
        raise TokenizerError(
            f'{name} must be a list of {{"role": ..., "content": ...}}, got {type(items).__name__}'
        )
    return list(items)


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of one conversation without keys whose value is None."""
    messages = _list("conversation", messages)
    for message in messages:
        if not isinstance(message, Mapping):
            raise TokenizerError(
                'conversation must be a list of {"role": ..., "content": ...}, '
                f"got {type(message).__name__} in it"
            )
        if isinstance(message.get("content"), str):
            check_text("conversation: content", message["content"])
    return [{key: value for key, value in m.items() if value is not None} for m in messages]
