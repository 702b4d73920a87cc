"""Benchmarks beside eager PyTorch, flash-attn and whoever else is installed.

python -m pytest benchmarks --benchmark-json results.json
python -m benchmarks.report results.json
"""
