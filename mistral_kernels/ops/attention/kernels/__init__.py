"""Triton kernels of attention: forward, backward, and decode over a cache."""
