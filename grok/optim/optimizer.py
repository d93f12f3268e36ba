"""The optimizer and the learning rate of a run, by name. Each optimizer turns a gradient into a
direction; clipping, decay and groups are the same for all."""

import jax
import jax.numpy as jnp
import optax

from grok.config import OptimizerConfig, RunConfig
from grok.model.params import tensor_specs
from grok.optim.adafactor import scale_by_factored_second_moment
from grok.optim.muon import scale_by_muon
from grok.optim.param_groups import Specs, check_groups, group_of, map_named

# Wraps a function of optax, which multiplies counts by floats, where dtype promotion is strict.
_with_optax_promotion = jax.numpy_dtype_promotion("standard")


def make_optimizer(run: RunConfig) -> optax.GradientTransformation:
    """Returns the optimizer that the config names, for the parameters that it trains. Raises
    ConfigError when a parameter group matches no tensor of the model."""
    specs, config = tensor_specs(run.model, run.lora), run.optimizer
    check_groups(run, specs)
    chain = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        DIRECTIONS[config.name](config, specs),
        decay_weights(config, specs),
        optax.scale_by_learning_rate(make_schedule(config, run.train.steps)),
        scale_groups(config),
    )
    return optax.GradientTransformation(chain.init, _with_optax_promotion(chain.update))


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of a run of `steps` steps, as a function of the steps done. It
    rises from peak_lr / (warmup_steps + 1) to peak_lr. From there to min_lr_ratio of it go half a
    cosine, a straight line, or, for wsd (warm-up, stable, decay; Hu et al. 2024, section 4), a
    straight line over the last decay_steps; constant stays."""
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
    return _with_optax_promotion(optax.join_schedules([rise, course], [warmup]))


def _adam(config: OptimizerConfig, specs: Specs) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), without its decay, which `decay_weights` adds."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    return keep_moments_in(config.moments_dtype, adam)


def _adafactor(config: OptimizerConfig, specs: Specs) -> optax.GradientTransformation:
    factored = scale_by_factored_second_moment(config.beta2, specs)
    if not config.beta1:
        return factored
    momentum = optax.ema(config.beta1, debias=False)
    return optax.chain(factored, keep_moments_in(config.moments_dtype, momentum))


def _lion(config: OptimizerConfig, specs: Specs) -> optax.GradientTransformation:
    """Chen et al. 2023; its learning rates are three to ten times below AdamW's."""
    return keep_moments_in(config.moments_dtype, optax.scale_by_lion(config.beta1, config.beta2))


def _muon(config: OptimizerConfig, specs: Specs) -> optax.GradientTransformation:
    """Muon for the matrices of attention and experts, AdamW for table, router and norms."""
    muon = keep_moments_in(config.moments_dtype, scale_by_muon(config.muon_momentum, specs))

    def kinds(params):
        return map_named(lambda name, _: "muon" if specs[name].is_matmul else "adam", params)

    return optax.partition({"muon": muon, "adam": _adam(config, specs)}, kinds)


DIRECTIONS = {"adamw": _adam, "adafactor": _adafactor, "lion": _lion, "muon": _muon}


def keep_moments_in(dtype: str, inner: optax.GradientTransformation):
    """`inner`, computed in float32, with its moments stored in `dtype` between steps."""
    if dtype == "float32":
        return inner

    def convert(state, before, after):
        # Step counts are integers and keep their type.
        return jax.tree.map(lambda x: x.astype(after) if x.dtype == before else x, state)

    def init(params):
        return convert(inner.init(params), jnp.float32, dtype)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, convert(state, dtype, jnp.float32), params)
        return updates, convert(state, jnp.float32, dtype)

    return optax.GradientTransformation(init, update)


def decay_weights(config: OptimizerConfig, specs: Specs) -> optax.GradientTransformation:
    """Adds weight decay to each update; norm scales have none, unless a group says so."""

    def decay(name: str) -> float:
        group = group_of(config, name)
        if group is not None and group.weight_decay is not None:
            return group.weight_decay
        return 0.0 if specs[name].use == "norm" else config.weight_decay

    def add(name: str, update, param):
        return update + decay(name) * param if decay(name) else update

    return optax.stateless(lambda updates, params: map_named(add, updates, params))


def scale_groups(config: OptimizerConfig) -> optax.GradientTransformation:
    """Multiplies each update by its group's `lr_scale`."""

    def scale(name: str, update):
        group = group_of(config, name)
        return update if group is None or group.lr_scale == 1 else update * group.lr_scale

    return optax.stateless(lambda updates, _: map_named(scale, updates))
