"""`grok calibrate`: kernels against their references, and what the devices here really do."""
