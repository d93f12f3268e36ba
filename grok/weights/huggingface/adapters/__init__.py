"""The names and layouts that each model family has on Hugging Face."""
