"""`grok inspect`, `grok verify` and `grok export params`."""
