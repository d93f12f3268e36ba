"""Inference: sampling, and the engine that turns prompts into tokens."""
