"""Our own checkpoints as a source of weights, read without Orbax."""
