"""Render the instruct templates of Mistral with the mistral-common library."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from mistral_kernels.tokenizer.base import MistralTokenizer
from mistral_kernels.tokenizer.errors import TokenizerError, library_errors, missing_package

_CHAT_OPTIONS = {"tools", "add_generation_prompt", "continue_final_message", "template_kwargs"}


class Vendor(MistralTokenizer):
    """Base class of tokenizers in Mistral's own files: sentencepiece models and tekken.json.

    `_vendor_size` is the size of the vocabulary without added tokens.
    """

    _vendor_size: int

    @abstractmethod
    def _instruct_tokenizer(self) -> Any:
        """Return the InstructTokenizer of mistral-common for this file."""

    def _apply_flags(self) -> None:
        """Set whether BOS and EOS are added by default, as tokenizer_config.json requires."""
        bos, eos = self.bos_token_id, self.eos_token_id
        self._prefix_ids = [bos] if self._files.add_bos and bos is not None else []
        self._suffix_ids = [eos] if self._files.add_eos and eos is not None else []

    def _check_template_settable(self) -> None:
        raise TokenizerError(
            f"chat_template cannot be set: mistral-common renders the template of {self.path}; a "
            "template in the folder requires a tokenizer.json"
        )

    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]:
        for name, value in {**options["template_kwargs"], **options}.items():
            if value is not None and name not in _CHAT_OPTIONS:
                raise TokenizerError(f"{name} must be None for Mistral's own chat template")
        try:
            from mistral_common.protocol.instruct.normalize import get_normalizer
            from mistral_common.protocol.instruct.request import ChatCompletionRequest
            from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Common
        except ImportError as error:
            raise missing_package(
                "the chat template of", self.path, "mistral-common", "chat"
            ) from error
        instruct = self._instruct_tokenizer()
        version = instruct.tokenizer.version
        last = messages[-1] if messages else {}
        if options["continue_final_message"]:
            if last.get("role") != "assistant":
                raise TokenizerError(
                    "continue_final_message must be False unless the last message has the role "
                    f"'assistant', got {last.get('role')!r}"
                )
            last = last | {"prefix": True}
            messages = [*messages[:-1], last]
        ends = last.get("role") == "assistant" and not last.get("prefix")
        finished = ends and not options["add_generation_prompt"]
        mode = ValidationMode.finetuning if finished else ValidationMode.test
        with library_errors("messages"):
            normalizer = get_normalizer(version, instruct.tokenizer.model_settings_builder)
            common: Any = Common(instruct, get_validator(version, mode=mode), normalizer)
            request: Any = ChatCompletionRequest.model_validate(
                {"messages": messages, "tools": options["tools"]}
            )
            ids = common.encode_chat_completion(request).tokens
        return ids, self.decode(ids)
