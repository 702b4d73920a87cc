"""What the commands share: options, one-line errors, exit codes."""
