"""Text from a model: streaming, chat, and the statistics of a run."""
