"""Training loop and its saved state, in one process or on several ranks with FSDP2."""
