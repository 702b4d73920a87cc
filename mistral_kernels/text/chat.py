"""Conversation with an instruct model that keeps its rolling cache between messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mistral_kernels.model.transformer import MistralForCausalLM
from mistral_kernels.text.streaming import DEFAULT_MAX_TOKENS, TextDelta, stream_generate
from mistral_kernels.tokenizer import MistralTokenizer


class Conversation:
    """Chat that keeps its rolling cache between messages.

    For each message, the model's chat template renders the whole conversation. Only the tokens
    after the longest prefix that is already in the cache are computed. The prefix may be shorter
    than the cache: templates may move the system message, and the tokens of an answer may differ
    from those that were sampled. The tokens after the prefix are then dropped from the cache.
    If a ring has already overwritten keys that are needed again, the whole cache is filled again.

    Any method may be interrupted: the next one begins with a consistent conversation.

    Attributes:
        messages: the conversation, in the format that `apply_chat_template` takes.
        max_length: maximum number of tokens of the conversation, unless the cache is `endless`.
        dropped: number of turns, user messages with their answers, that the last `prompt_for` or
            `regenerate` removed.
        transcript: all messages since the beginning or `clear`, including those that were removed
            to fit in `max_length`.

    Example:
        >>> from mistral_kernels import MistralForCausalLM, MistralTokenizer
        >>> from mistral_kernels.text.chat import Conversation
        >>> model = MistralForCausalLM.from_pretrained("tiny")
        >>> tokenizer = MistralTokenizer.from_pretrained("tiny")
        >>> conversation = Conversation(model, tokenizer, system="Be brief.")
        >>> conversation.messages  # a model with a chat template also answers: see `reply`
        [{'role': 'system', 'content': 'Be brief.'}]
        >>> conversation.system = None
        >>> conversation.messages
        []
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
        self.messages: list[dict[str, str]] = []
        self.system = system
        self.dropped = 0
        self._removed: list[dict[str, str]] = []
        self.max_length = max_length or model.config.default_length
        self._cache = model.new_cache(1, self.max_length)
        # Token ids of the cache; [] if they are not certain, after an interrupt.
        self._cached: list[int] = []
        self._replaced: dict[str, str] | None = None  # the answer that `regenerate` removed

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in bytes."""
        return self._cache.nbytes

    @property
    def endless(self) -> bool:
        """Whether the number of tokens is unlimited: every layer has a sliding window."""
        return self._cache.endless

    @property
    def full(self) -> bool:
        """Whether the cache has no room for another token."""
        return self._room() <= 0

    def _room(self) -> float:
        """Return the number of tokens that still fit in the cache."""
        return math.inf if self.endless else self.max_length - len(self._cached)

    @property
    def system(self) -> str | None:
        """The system message; None: none. Assign to replace it, also during a conversation."""
        return self.messages[0]["content"] if self._has_system else None

    @system.setter
    def system(self, text: str | None) -> None:
        new = [{"role": "system", "content": text}] if text else []
        self.messages[: int(self._has_system)] = new

    @property
    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    @property
    def transcript(self) -> list[dict[str, str]]:
        """All messages; see the description of the class."""
        start = int(self._has_system)
        return [*self.messages[:start], *self._removed, *self.messages[start:]]

    def clear(self) -> int:
        """Remove all messages except the system message, and return their number."""
        start = int(self._has_system)
        count = len(self.messages) - start
        del self.messages[start:]
        self._removed = []
        return count

    def drop(self, turns: int = 1) -> int:
        """Remove the oldest turns: user messages, each with its answer.

        The system message stays, and so does a last message without an answer.

        Args:
            turns: number of turns to remove.

        Returns:
            The number of removed turns, less than `turns` if there are not as many.
        """
        roles = [message["role"] for message in self.messages]
        starts = [i for i, role in enumerate(roles) if role == "user"]
        ends = starts[1:] + [len(roles)] * (roles[-1:] == ["assistant"])
        turns = min(turns, len(ends))
        if turns > 0:
            del self.messages[starts[0] : ends[turns - 1]]
        return max(turns, 0)

    def prompt_for(self, message: str, room: int = 1) -> list[int]:
        """Append a user message and return the tokens that are not in the cache yet.

        If the conversation does not fit in `max_length` tokens, its oldest turns are removed, and
        `dropped` is their number.

        Args:
            message: the message.
            room: number of tokens to keep free for the answer. A message that leaves fewer tokens
                free, even without earlier turns, is accepted.

        Raises:
            ValueError: the message is empty, the template renders no tokens, or the message with
                the system message is longer than `max_length` and the cache is not `endless`. The
                conversation is then unchanged.
        """
        if not message.strip():
            raise ValueError("message must not be empty")
        self._settle("")
        kept = list(self.messages)
        self.messages.append({"role": "user", "content": message})
        return self._prompt(room, kept)

    def regenerate(self, room: int = 1) -> list[int]:
        """Remove the last answer and return the tokens of its prompt that are not in the cache.

        The next `reply` generates another answer. If that answer is empty, the removed one is
        restored.

        Args:
            room: see `prompt_for`.

        Raises:
            ValueError: the conversation does not end with an answer; see also `prompt_for`.
        """
        self._settle("")
        if [message["role"] for message in self.messages[-2:]] != ["user", "assistant"]:
            raise ValueError("the conversation has no answer to generate again; send a message")
        kept = list(self.messages)
        self._replaced = self.messages.pop()
        return self._prompt(room, kept)

    def _prompt(self, room: int, kept: list[dict[str, str]]) -> list[int]:
        """Return the tokens of the conversation that are not in the cache.

        If an exception is raised, `kept` becomes the conversation again.
        """
        removed = list(self._removed)
        try:
            ids = self._render_within(room)
        except BaseException:
            self.messages, self._removed, self._replaced = kept, removed, None
            raise
        common = 0
        # Always compute the last token: the answer is sampled from its logits.
        # strict=False: either list may be longer.
        for cached, rendered in zip(self._cached, ids[:-1], strict=False):
            if cached != rendered:
                break
            common += 1
        self._cached = []
        try:
            if common == 0:
                self._cache.reset()
            elif common != self._cache.host_lengths[0]:
                self._cache.drop(self._cache.host_lengths[0] - common)
        except ValueError:
            self._cache.reset()
            common = 0
        self._cached = ids
        return ids[common:]

    def _render_within(self, room: int) -> list[int]:
        """Render the conversation, and drop the oldest turns until it leaves `room` tokens."""
        self.dropped = 0
        ids = self._render(self.messages)
        # The last token of an answer needs no slot: it is not appended to the cache.
        if self.endless or len(ids) + room - 1 <= self.max_length:
            return ids
        alone = self._render([*self.messages[: int(self._has_system)], self.messages[-1]])
        if len(alone) > self.max_length:
            raise ValueError(
                f"the message with the chat template must have at most {self.max_length} tokens "
                f"(--context, max_length), got {len(alone)}; shorten it, or increase the context"
            )
        before, start = list(self.messages), int(self._has_system)
        while len(ids) + room - 1 > self.max_length and self.drop():
            self.dropped += 1
            ids = self._render(self.messages)
        self._removed += before[start : start + len(before) - len(self.messages)]
        return ids

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        if not ids:
            folder = self.tokenizer.path.parent
            raise ValueError(f"the chat template in {folder} must render a prompt, got no tokens")
        return ids

    def _settle(self, answer: str) -> None:
        """Append the answer to the last message; an empty answer removes the message.

        In `regenerate`, the earlier answer is appended instead of an empty one.
        """
        if self.messages and self.messages[-1]["role"] == "user":
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            elif self._replaced is not None:
                self.messages.append(self._replaced)
            else:
                self.messages.pop()
        self._replaced = None

    def reply(self, prompt: list[int], **options: Any) -> Iterator[TextDelta]:
        """Yield the answer to the tokens of `prompt_for`, and append the answer to `messages`.

        An incomplete answer is appended too if the caller stops early. If the context is full, the
        answer ends with the finish_reason "length". If the answer is empty, the user's message is
        removed from `messages`, because chat templates do not render empty answers.

        Args:
            prompt: the tokens that `prompt_for` or `regenerate` returned.
            **options: options of `stream_generate`, such as `max_tokens` and `sampler`.
        """
        answer = ""
        tokens: list[int] = []
        room = self._room() + 1  # the last token of an answer needs no slot
        if room < options.get("max_tokens", DEFAULT_MAX_TOKENS):
            options["max_tokens"] = int(room)
        cached, self._cached = self._cached, []
        try:
            for delta in stream_generate(
                self.model,
                self.tokenizer,
                [prompt],
                cache=self._cache,
                context=[cached],
                standalone=True,
                **options,
            ):
                answer += delta.text
                tokens.append(delta.token_id)
                yield delta
        finally:
            self._settle(answer)
            if not self._cache.interrupted:
                self._cached = (cached + tokens)[: self._cache.host_lengths[0]]
