"""Benchmarks of this package, eager PyTorch, flash-attn and every other provider that is installed.

python -m benchmarks --help
python -m benchmarks --op attention --plots plots
python -m benchmarks.report results.json --base older.json
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
# The tolerance rule of the tests, and the tools that execute and read compiled kernels.
sys.path += [str(_TESTS), str(_TESTS / "tools")]
