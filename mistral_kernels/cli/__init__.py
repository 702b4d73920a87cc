"""Parts that the commands share: options, one-line errors, exit codes."""
