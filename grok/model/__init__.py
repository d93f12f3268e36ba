"""The Grok-1 architecture on flax.nnx, used thinly: modules hold parameters, nothing more."""
