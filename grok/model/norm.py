"""Root-mean-square norm. Letters: B batch, T length, D embed."""

import jax
import jax.numpy as jnp
from flax import nnx

from grok.config import ModelConfig
from grok.model.param_spec import ParamSpec, init_params


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), in float32; the scale is used as it is."""

    scale_D: nnx.Param

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """One scale for each channel."""
        return {"scale_D": ParamSpec.norm(config.embed_dim)}

    def __init__(self, key: jax.Array | None, config: ModelConfig, num_layers: int | None = None):
        self.eps = config.norm.eps
        init_params(self, key, self.param_specs(config), config, num_layers)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns x / sqrt(mean(x^2) + eps) * scale, in the type of `x_BTD`."""
        x = x_BTD.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale_D = self.scale_D[...].astype(jnp.float32)
        return (x * scale_D[None, None, :]).astype(x_BTD.dtype)
