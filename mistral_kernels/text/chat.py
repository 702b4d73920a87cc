"""Conversation with an instruct model that keeps its rolling cache between messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.text.streaming import DEFAULT_MAX_TOKENS, TextDelta, stream_generate
from mistral_kernels.tokenizer import MistralTokenizer


class Conversation:
    """Chat that keeps its rolling cache between messages.

    For each message, the model's chat template renders the whole conversation. Only the tokens
    after the longest prefix that is already in the cache are computed. The prefix may be shorter
    than the cache: templates may move the system prompt, and an answer may be tokenized differently
    from the tokens that were sampled. The tokens after the prefix are then dropped from the cache.
    If a ring has already overwritten keys that are needed again, a new cache is filled instead.

    Attributes:
        messages: the conversation, in the format that `apply_chat_template` takes.
        max_length: maximum number of tokens of the conversation, unless the cache is `endless`.
    """

    def __init__(
        self,
        model: MistralForCausalLM,
        tokenizer: MistralTokenizer,
        system: str | None = None,
        max_length: int | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            model: the model that answers.
            tokenizer: its tokenizer, which must have a chat template.
            system: the system message; None: none.
            max_length: maximum number of tokens of the conversation, unless the cache is `endless`;
                None: the model's `max_position_embeddings`, at most 32768.
        """
        self.model, self.tokenizer = model, tokenizer
        self.messages = [{"role": "system", "content": system}] if system else []
        # A layer without a window allocates memory for the whole conversation at once.
        self.max_length = max_length or min(model.config.max_position_embeddings, 32768)
        self._cache: RollingCache
        self._cached: list[int]
        self._new_cache()

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in bytes."""
        return self._cache.nbytes

    @property
    def full(self) -> bool:
        """Whether the cache has no room for another token."""
        return self._room() <= 0

    def _room(self) -> float:
        """Return the number of tokens that still fit in the cache."""
        return math.inf if self._cache.endless else self.max_length - len(self._cached)

    def prompt_for(self, message: str) -> list[int]:
        """Append a user message and return the tokens that are not in the cache yet.

        Raises:
            ValueError: the message is empty, the template renders no tokens, or the conversation
                with the message is longer than `max_length` and the cache is not `endless`.
        """
        if not message.strip():
            raise ValueError("message must not be empty")
        self.messages.append({"role": "user", "content": message})
        ids: list[int] = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=False
        )
        if not ids:
            self.messages.pop()
            folder = self.tokenizer.path.parent
            raise ValueError(f"the chat template in {folder} must render a prompt, got no tokens")
        if not self._cache.endless and len(ids) > self.max_length:
            self.messages.pop()
            raise ValueError(
                f"the conversation with this message must have at most {self.max_length} tokens "
                f"(--context, max_length), got {len(ids)}; increase it, or begin a new conversation"
            )
        common = 0
        # Always compute the last token: the answer is sampled from its logits.
        # strict=False: either list may be longer.
        for cached, rendered in zip(self._cached, ids[:-1], strict=False):
            if cached != rendered:
                break
            common += 1
        held = self._cache.host_lengths[0]
        if common != held:
            try:
                self._cache.drop(held - common)
            except ValueError:
                self._new_cache()
                common = 0
        self._cached = ids
        return ids[common:]

    def _new_cache(self) -> None:
        self._cache, self._cached = self.model.new_cache(1, self.max_length), []

    def reply(self, prompt: list[int], **options: Any) -> Iterator[TextDelta]:
        """Yield the answer to the tokens of `prompt_for`, and append the answer to `messages`.

        An incomplete answer is appended too if the caller stops early. If the context is full, the
        answer ends with the finish_reason "length". If the answer is empty, the user's message is
        removed from `messages`, because chat templates do not render empty answers.

        Args:
            prompt: the tokens that `prompt_for` returned.
            **options: options of `stream_generate`, such as `max_tokens` and `sampler`.
        """
        answer = ""
        tokens: list[int] = []
        # The last token of an answer needs no slot: it is not appended to the cache.
        room = self._room() + 1
        if room < options.get("max_tokens", DEFAULT_MAX_TOKENS):
            options["max_tokens"] = int(room)
        try:
            for delta in stream_generate(
                self.model,
                self.tokenizer,
                [prompt],
                cache=self._cache,
                context=[self._cached],
                standalone=True,
                **options,
            ):
                answer += delta.text
                tokens.append(delta.token_id)
                yield delta
        finally:
            self._cached = (self._cached + tokens)[: self._cache.host_lengths[0]]
            if self._cache.interrupted:
                self._new_cache()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()
