"""Routed experts: the XLA form, the Pallas form, and the routing permutation under both."""
