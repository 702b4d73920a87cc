"""`AutoTokenizer`: tokenizer with the results of transformers' `AutoTokenizer`."""

from __future__ import annotations

from mistral_kernels.tokenizer.base import MistralTokenizer


class AutoTokenizer(MistralTokenizer):
    """Tokenizer of a Mistral model as in transformers; open one with `from_pretrained`.

    If a folder holds a tokenizer.json, that file is opened, even if the folder also holds Mistral's
    own files. A tokenizer.json differs from Mistral's own files in three points:

    - The name of a special token in a text becomes the token. A text from an untrusted source can
      therefore contain special tokens.
    - The chat template is the one in the folder.
    - `decode` puts spaces where transformers puts them.

    Example:
        >>> from mistral_kernels import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("tiny", padding_side="left")
        >>> tokenizer("It is a truth", return_tensors="pt").input_ids
        tensor([[   1,  592,  368,  261, 1905]])
    """

    _prefers_json = True
