"""Weights on disk: our own checkpoints, and the formats that Grok-1 was published in."""
