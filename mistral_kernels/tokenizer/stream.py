"""Decode token ids one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container

import torch

from mistral_kernels.tokenizer.arguments import (
    check_ids,
)
from mistral_kernels.tokenizer.errors import TokenizerError


class StreamDecoder:
    """Decode token ids as they arrive, in constant time per token.

    Join the texts that `push` returns and the text of a final `flush`: the result is the text that
    `decode` returns for all ids, without the text of the prompt if there is one. `push` returns
    only text that no later token can change. Therefore it never returns part of a character.
    """

    def __init__(
        self, known_ids: Container[int], piece: Callable[[int], bytes | str], errors: str
    ) -> None:
        # `piece` returns the bytes of a token, or its text as a str. Before a str, an incomplete
        # character is flushed.
        self._known_ids, self._piece = known_ids, piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int | torch.Tensor) -> str:
        """Add a token and return the text that is complete with it; "" inside a character.

        Args:
            token_id: The next token id, an integer or a tensor of one element.
        """
        ids = check_ids(token_id)
        if len(ids) != 1:
            raise TokenizerError(f"token_id must be one token id, got {len(ids)}")
        return self._advance(ids[0]) if ids[0] in self._known_ids else ""

    def _feed_prompt(self, prompt_ids: list[int]) -> None:
        """Decode the prompt and discard its text."""
        for token_id in prompt_ids:
            self._advance(token_id)

    def _advance(self, token_id: int) -> str:
        """Return the text that is complete with this token; the id must have a token."""
        piece = self._piece(token_id)
        return self._utf8.decode(piece) if isinstance(piece, bytes) else self.flush() + piece

    def flush(self) -> str:
        """Return the text that is still held: U+FFFD for an incomplete character, else ""."""
        return self._utf8.decode(b"", final=True)
