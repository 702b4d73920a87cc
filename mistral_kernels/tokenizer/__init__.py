"""Convert text to token ids and back: one interface to three file formats and their libraries."""

from mistral_kernels.tokenizer.base import (
    MistralTokenizer,
    StreamDecoder,
    TokenizerError,
    TokenizerOutput,
)

__all__ = ["MistralTokenizer", "StreamDecoder", "TokenizerError", "TokenizerOutput"]
