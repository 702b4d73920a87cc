"""Check arguments of transformers' functions that this package does not implement.

Code that was written for transformers passes many arguments at values that change nothing, such as
`num_beams=1`. These values are accepted. Any other value raises an error that names the argument
and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

TRANSFORMERS = (
    'load the model with transformers and attn_implementation="mistral_kernels" '
    "(mistral_kernels.integrations.transformers)"
)
_LONGEST_VALUE = 100  # characters of a value in a message


class Unsupported(NamedTuple):
    """An argument that is accepted only at values without effect.

    Attributes:
        without_effect: the accepted values.
        remedy: what to do instead, an imperative sentence without a full stop.
    """

    without_effect: tuple[Any, ...] = (None,)
    remedy: str = TRANSFORMERS


ANY_FLAG = Unsupported((None, False, True))

# Arguments of `from_pretrained` of models and tokenizers. No code of a checkpoint is run.
OPENING = {
    "trust_remote_code": ANY_FLAG,
    "resume_download": ANY_FLAG,
    "use_auth_token": Unsupported((None, True), "give the token as token"),
    "subfolder": Unsupported((None, ""), "give the folder that holds the files"),
    "proxies": Unsupported(remedy="set the environment variable HTTPS_PROXY"),
}


def check_unsupported(
    function: str, arguments: Mapping[str, Any], table: Mapping[str, Unsupported]
) -> None:
    """Accept the arguments whose values have no effect.

    Args:
        function: name of the called function, for messages.
        arguments: names and values of the arguments.
        table: the known arguments that `function` does not implement.

    Raises:
        TypeError: an argument is not in `table`.
        NotImplementedError: a value has an effect.
    """
    for name, value in arguments.items():
        if name not in table:
            raise TypeError(f"{function}() got an unexpected argument {name!r}")
        accepted = table[name].without_effect
        if not any(value is x or (type(value) is type(x) and value == x) for x in accepted):
            expected = " or ".join(map(repr, accepted))
            got = repr(value)
            if "\n" in got or len(got) > _LONGEST_VALUE:  # such as a module or a tensor
                got = type(value).__name__
            raise NotImplementedError(f"{name} must be {expected}, got {got}; {table[name].remedy}")
