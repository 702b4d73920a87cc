"""`AutoTokenizer`: tokenizers that return what those of transformers return."""

from __future__ import annotations

from mistral_kernels.tokenizer.base import MistralTokenizer


class AutoTokenizer(MistralTokenizer):
    """Tokenizer of a Mistral model as in transformers; open one with `from_pretrained`.

    If a folder holds a tokenizer.json, it is opened, also beside Mistral's own files. There are
    three differences from the `MistralTokenizer` of Mistral's own files: the name of a special
    token in a text becomes the token, the chat template is that in the folder, and `decode` puts
    spaces where transformers puts them. A text from an untrusted source can therefore contain
    special tokens.

    Example:
        >>> from mistral_kernels import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("tiny", padding_side="left")
        >>> tokenizer("It is a truth", return_tensors="pt").input_ids
        tensor([[   1,  592,  368,  261, 1905]])
    """

    _prefers_json = True
