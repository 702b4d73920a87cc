"""Benchmarks beside eager PyTorch, flash-attn and whoever else is installed.

python -m pytest benchmarks --benchmark-json results.json
python -m benchmarks.report results.json
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
# The tolerance rule of the tests, and the tools that execute and read compiled kernels.
sys.path += [str(_TESTS), str(_TESTS / "tools")]
