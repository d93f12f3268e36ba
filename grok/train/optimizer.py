"""The optimizer: clipping by global norm, AdamW, warm-up and cosine."""

import optax

from grok.config import OptimizerConfig, RunConfig
from grok.model.names import shapes
from grok.train.groups import check_groups, group_of, map_named


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from peak/(warmup+1), then a cosine to its last share."""
    warmup = config.warmup_steps
    rise = optax.linear_schedule(config.peak_lr / (warmup + 1), config.peak_lr, warmup)
    fall = optax.cosine_decay_schedule(config.peak_lr, steps - warmup, config.final_lr_share)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(run: RunConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping; norm scales are not decayed.

    Raises ConfigError when the config's groups are not about tensors of its model.
    """
    check_groups(run, list(shapes(run.model)))
    config = run.optimizer
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        decay_weights(config),
        optax.scale_by_learning_rate(make_schedule(config, run.train.steps)),
        scale_groups(config),
    )


def decay_weights(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adds to each update its tensor's decay; norm scales have none, unless a group says so."""

    def decay(name: str) -> float:
        group = group_of(config, name)
        if group is not None and group.weight_decay is not None:
            return group.weight_decay
        return 0.0 if "scale_D" in name else config.weight_decay

    def add(name: str, update, param):
        return update + decay(name) * param if decay(name) else update

    return optax.stateless(lambda updates, params: map_named(add, updates, params))


def scale_groups(config: OptimizerConfig) -> optax.GradientTransformation:
    """Multiplies each update by its group's factor on the learning rate."""

    def scale(name: str, update):
        group = group_of(config, name)
        return update if group is None or group.lr_scale == 1 else update * group.lr_scale

    return optax.stateless(lambda updates, _: map_named(scale, updates))
