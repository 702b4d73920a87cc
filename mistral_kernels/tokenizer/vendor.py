"""Render the instruct templates of Mistral with the mistral-common library."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from mistral_kernels.tokenizer.base import MistralTokenizer
from mistral_kernels.tokenizer.errors import TokenizerError, library_errors, missing_package


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

    def _chat(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str]:
        for name in ("documents", "chat_template"):
            if options[name] is not None:
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
        ends = bool(messages) and messages[-1].get("role") == "assistant"
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
