"""The decoder on flax.nnx, used thinly: modules hold parameters, nothing more."""
