"""The public names of `grok` in Python, over what the commands run: see docs/python.md."""
