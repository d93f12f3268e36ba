"""A block of the decoder, the same for training, prefill and decode. Letters: B batch, T length,
D embed."""

import math

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from grok import sharding
from grok.config import ModelConfig
from grok.model.attend import Attend
from grok.model.attention import Attention
from grok.model.mlp import MLP
from grok.model.moe import MoE, Routing
from grok.model.norm import RMSNorm
from grok.model.param_spec import ParamSpec, prefixed, split_key

PRE_NORMS = ("pre_attn_norm", "pre_ffn_norm")
SANDWICH_NORMS = ("pre_attn_norm", "post_attn_norm", "pre_ffn_norm", "post_ffn_norm")


class Block(nnx.Module):
    """x += norm(attention(norm(x))); x += norm(feed_forward(norm(x))).

    The feed-forward part is an MLP, experts, or (MLP + experts) / sqrt(2). Without sandwich norms,
    what attention and feed-forward give is added as it is.
    """

    @staticmethod
    def param_specs(config: ModelConfig) -> dict[str, ParamSpec]:
        """The weights of one layer."""
        specs = prefixed("attention", Attention.param_specs(config))
        if config.mlp is not None:
            specs |= prefixed("mlp", MLP.param_specs(config))
        if config.moe is not None:
            specs |= prefixed("moe", MoE.param_specs(config))
        norms = SANDWICH_NORMS if config.norm.sandwich else PRE_NORMS
        for name in norms:
            specs |= prefixed(name, RMSNorm.param_specs(config))
        return specs

    def __init__(self, key: jax.Array | None, config: ModelConfig):
        keys = split_key(key, 3)

        def norm() -> RMSNorm:
            return RMSNorm(key, config, config.num_layers)

        sandwich = config.norm.sandwich
        self.pre_attn_norm = norm()
        self.attention = Attention(keys[0], config)
        self.post_attn_norm = norm() if sandwich else None
        self.pre_ffn_norm = norm()
        self.moe = None if config.moe is None else MoE(keys[1], config)
        self.mlp = None if config.mlp is None else MLP(keys[2], config)
        self.post_ffn_norm = norm() if sandwich else None

    def __call__[A: Attend](
        self, x_BTD: jax.Array, attend: A, token_mask_BT: jax.Array | None
    ) -> tuple[jax.Array, A, Routing | None]:
        """Returns the residual stream after this block, what the next layer attends to, and where
        tokens were routed; None without experts.

        Tokens outside of `token_mask_BT` need no expert's output; None: all tokens do.
        """
        x_BTD = checkpoint_name(x_BTD, "stream")
        a_BTD, attend = self.attention(self.pre_attn_norm(x_BTD), attend)
        x_BTD = x_BTD + (self.post_attn_norm(a_BTD) if self.post_attn_norm else a_BTD)
        axes = attend.stream_axes(x_BTD.shape[1])
        m_BTD, routing = self._feed_forward(self.pre_ffn_norm(x_BTD), token_mask_BT, axes)
        m_BTD = checkpoint_name(m_BTD, "experts")
        return x_BTD + (self.post_ffn_norm(m_BTD) if self.post_ffn_norm else m_BTD), attend, routing

    def _feed_forward(
        self, h_BTD: jax.Array, token_mask_BT: jax.Array | None, axes: sharding.Axes
    ) -> tuple[jax.Array, Routing | None]:
        if self.moe is None:
            assert self.mlp is not None
            return self.mlp(h_BTD, axes), None
        beside = [] if self.mlp is None else [self.mlp.group_work()]
        m_BTD, routing = self.moe(h_BTD, token_mask_BT, axes, beside)
        return m_BTD / math.sqrt(2) if beside else m_BTD, routing
