"""Text to token ids and back: one interface over three kinds of file and their libraries."""

from mistral_kernels.tokenizer.base import (
    MistralTokenizer,
    StreamDecoder,
    TokenizerError,
    TokenizerOutput,
)

__all__ = ["MistralTokenizer", "StreamDecoder", "TokenizerError", "TokenizerOutput"]
