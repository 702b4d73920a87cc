"""Check, on import, that transformers is there and of a supported version."""

from __future__ import annotations

import re

OLDEST = (4, 56)

_NEEDS = f"mistral_kernels.integrations.transformers needs transformers >= {OLDEST[0]}.{OLDEST[1]}"

try:
    import transformers
except ImportError:
    raise ImportError(f"{_NEEDS}; run pip install 'mistral_kernels[hf]'") from None

_found = tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:2])
if _found < OLDEST:
    found = transformers.__version__
    raise ImportError(f"{_NEEDS}, found {found}; run pip install -U transformers")
