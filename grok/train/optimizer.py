"""The optimizer: clipping by global norm, AdamW, warm-up and cosine."""

import jax
import optax

from grok.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from peak/(warmup+1), then a cosine to its last share."""
    warmup = config.warmup_steps
    rise = optax.linear_schedule(config.peak_lr / (warmup + 1), config.peak_lr, warmup)
    fall = optax.cosine_decay_schedule(config.peak_lr, steps - warmup, config.final_lr_share)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping; norm scales are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params):
    """True at every parameter that weight decay shrinks: all but the scales of norms."""

    def decays(path, _) -> bool:
        return "scale_D" not in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(decays, params)
