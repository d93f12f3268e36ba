"""`grok plan`: compiles a step for a TPU slice, without one, and estimates its time and price."""
