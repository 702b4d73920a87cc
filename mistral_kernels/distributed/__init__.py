"""Several processes: the process group, and tensor parallelism."""
