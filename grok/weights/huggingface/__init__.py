"""Hugging Face folders: safetensors, config.json, and the names of each family."""
