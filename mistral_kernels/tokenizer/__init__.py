"""Convert text to token ids and back: one interface to three file formats and their libraries."""

from mistral_kernels.tokenizer.auto import AutoTokenizer
from mistral_kernels.tokenizer.base import MistralTokenizer
from mistral_kernels.tokenizer.errors import TokenizerError
from mistral_kernels.tokenizer.output import TokenizerOutput
from mistral_kernels.tokenizer.stream import StreamDecoder

__all__ = [
    "AutoTokenizer",
    "MistralTokenizer",
    "StreamDecoder",
    "TokenizerError",
    "TokenizerOutput",
]
