"""attention's Triton kernels: forward, backward, and decode over a cache."""
