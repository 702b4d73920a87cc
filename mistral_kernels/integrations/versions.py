"""Check on import that transformers is installed in a supported version."""

from __future__ import annotations

import re

OLDEST = (4, 56)

_REQUIRED = (
    f"mistral_kernels.integrations.transformers requires transformers >= {OLDEST[0]}.{OLDEST[1]}"
)

try:
    import transformers
except ImportError:
    raise ImportError(f"{_REQUIRED}; run pip install 'mistral_kernels[hf]'") from None

_found = tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:2])
if _found < OLDEST:
    found = transformers.__version__
    raise ImportError(f"{_REQUIRED}, found {found}; run pip install -U transformers")
