"""The learning rate by step: a linear warm-up, then one of four schedules."""

import optax

from grok.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of a run of `steps` steps, as a function of the steps done.

    It rises from peak_lr / (warmup_steps + 1) to peak_lr. From there to min_lr_ratio of it go
    half a cosine, a straight line, or, for wsd (warm-up, stable, decay; Hu et al. 2024, section 4),
    a straight line over the last decay_steps; constant stays.
    """
    peak, last = config.peak_lr, config.peak_lr * config.min_lr_ratio
    warmup, rest = config.warmup_steps, steps - config.warmup_steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    course = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.min_lr_ratio),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: optax.linear_schedule(
            peak, last, config.decay_steps, transition_begin=rest - config.decay_steps
        ),
    }[config.schedule]()
    return optax.join_schedules([rise, course], [warmup])
