"""A conversation with an instruct model, turn by turn, over one rolling cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mistral_kernels.model.cache import RollingCache
from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.text.streaming import DEFAULT_MAX_TOKENS, TextDelta, stream_generate
from mistral_kernels.tokenizer import MistralTokenizer


class Conversation:
    """A chat whose cache lives on between turns.

    Every turn renders the whole conversation by the vendor's template. Of its tokens those that the
    cache has seen are not computed again; where they differ (templates may move the system prompt,
    a sampled word may be spelt in other tokens) the cache goes back to the last common one, or, if
    its ring has wrapped, starts anew.
    """

    def __init__(
        self,
        model: MistralForCausalLM,
        tokenizer: MistralTokenizer,
        system: str | None = None,
        max_length: int | None = None,
    ) -> None:
        """Begin a conversation, with an optional system message.

        `max_length`: tokens to make room for where a layer has no window; default: as many as the
        model was made for, at most 32768.
        """
        self.model, self.tokenizer = model, tokenizer
        self.messages = [{"role": "system", "content": system}] if system else []
        # Without a window the cache has room for the whole conversation from the start.
        self.max_length = max_length or min(model.config.max_position_embeddings, 32768)
        self._cache: RollingCache
        self._cached: list[int]
        self._start_anew()

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    @property
    def full(self) -> bool:
        """True if the cache has no room for another token."""
        return self._room() <= 0

    def _room(self) -> float:
        """Return how many tokens the cache takes beyond those of the conversation so far."""
        return math.inf if self._cache.endless else self.max_length - len(self._cached)

    def prompt_for(self, message: str) -> list[int]:
        """Append a user message and return the tokens that are not in the cache yet.

        Raises ValueError for an empty message, a template that renders nothing, and where the
        context has no room for the message: without a window the cache holds every token.
        """
        if not message.strip():
            raise ValueError("the message is empty")
        self.messages.append({"role": "user", "content": message})
        ids = list(self.tokenizer.apply_chat_template(self.messages))
        if not ids:
            self.messages.pop()
            folder = self.tokenizer.path.parent
            raise ValueError(f"the chat template in {folder} must render a prompt, got no tokens")
        if not self._cache.endless and len(ids) > self.max_length:
            self.messages.pop()
            raise ValueError(
                f"the conversation has {len(ids)} tokens with this message, more than its context "
                f"of {self.max_length}; make room with --context (max_length), or begin another"
            )
        common = 0
        # The last token is always computed: its logits are what the answer starts from.
        # strict=False: the conversation may have grown, or have been cut or replaced.
        for ours, theirs in zip(self._cached, ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        held = self._cache.host_lengths[0]
        if common != held:
            try:
                self._cache.drop(held - common)
            except ValueError:
                self._start_anew()
                common = 0
        self._cached = ids
        return ids[common:]

    def _start_anew(self) -> None:
        self._cache, self._cached = self.model.new_cache(1, self.max_length), []

    def reply(self, prompt: list[int], **options: Any) -> Iterator[TextDelta]:
        """Generate the answer to `prompt_for`'s tokens and add it to `messages`.

        An interrupted answer is added as far as it got.
        Where the context is full the answer ends, with finish_reason "length".
        Templates have no place for an empty answer: with it, its question is forgotten.
        """
        answer = ""
        tokens: list[int] = []
        # The last token of an answer is not appended to the cache.
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
                self._start_anew()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()
