"""Training: the loop, its saved state, and both over several ranks with FSDP2."""
