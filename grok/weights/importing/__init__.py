"""`grok import`: any source of weights to a checkpoint, streamed and restartable."""
