"""A run's own checkpoints: saved through Orbax, retained by policy, and checked for damage."""
