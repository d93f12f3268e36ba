"""`grok inspect` and `grok verify`."""
