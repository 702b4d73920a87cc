"""Recognize models in formats that this package does not read, by the names of their files."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PYTORCH = "give the folder or hub id of the original model, with *.safetensors files"
# Patterns of file names; the content of such a file and what to do, for the message of an error.
_FORMATS = {
    r"adapter_(config\.json|model\..+)": "a PEFT adapter without its base model; merge the two "
    "first, with merge_and_unload() and save_pretrained() of PEFT",
    r"model_index\.json": "a diffusers pipeline; give a checkpoint of a Mistral language model",
    r".+\.gguf": f"GGUF weights, which are not supported; {_PYTORCH}",
    r".+\.onnx|tf_model.*\.h5|flax_model.*\.msgpack": "weights of ONNX, TensorFlow or Flax, which "
    f"are not supported; {_PYTORCH}",
    r".+\.distcp": "a sharded training state; give the folder that the training wrote at its end",
}


def find_foreign(names: Iterable[str]) -> str | None:
    """Return what the files hold and what to do, for the message of an error; None if unknown.

    Args:
        names: Names of the files of a folder or hub model without a readable checkpoint.
    """
    names = list(names)
    for pattern, what in _FORMATS.items():
        if any(re.fullmatch(pattern, name, re.IGNORECASE) for name in names):
            return what
    return None
