"""Multi-process code: the process group and tensor parallelism."""
