"""FLOPs that a model needs, whatever an implementation spends: the numerator of MFU.

Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022), appendix B: each token
costs two FLOPs forward and four backward for every matrix parameter that it meets, plus attention's
two products. Rematerialization does not count, so with full remat MFU cannot pass 75%. Shape
letters are those of `grok.model.decoder`.
"""

from grok.config import ModelConfig
from grok.model.params import active_size, param_specs


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """FLOPs of a training step for one token in rows of `sequence_length` (T).

    3 * (2 * matrix parameters of a token + L * 2 * N * H * T): a causal query sees T / 2 keys on
    average, 2 * N * H FLOPs each for its logits and again for the sum of values. Documents that are
    packed into a row are counted as if they saw each other, as is usual.
    """
    return 3 * (_matrix_flops(model) + attention_flops(model, sequence_length))


def decode_flops(model: ModelConfig, context: int) -> int:
    """FLOPs of a new token, which sees all of the `context` up to itself, or of its window."""
    keys = min(context, model.attention.window or context)
    return _matrix_flops(model) + _key_flops(model) * keys


def attention_flops(model: ModelConfig, sequence_length: int) -> int:
    """FLOPs of attention's two products in the forward pass, for one token. With a window W < T,
    the first W queries of a row see W / 2 keys on average, and the others W."""
    T = sequence_length
    W = min(T, model.attention.window or T)
    return _key_flops(model) * W * (2 * T - W) // (2 * T)


def _key_flops(model: ModelConfig) -> int:
    """FLOPs for each key that a query sees, over all layers."""
    return 4 * model.num_layers * model.attention.num_heads * model.attention.head_dim


def _matrix_flops(model: ModelConfig) -> int:
    """FLOPs of a token's products with matrices in the forward pass."""
    specs = param_specs(model).values()
    return 2 * sum(active_size(s, model) for s in specs if s.contract_dims and not s.is_lookup)
