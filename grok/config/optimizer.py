"""The optimizer, its learning rate, and groups of parameters with settings of their own."""

import dataclasses
from typing import Annotated, Literal

from grok.config.section import CountOrZero, Positive, PositiveOrZero, Section, Share
from grok.errors import ConfigError, bad_value

# A moment in bfloat16 with more stays what it is where no gradient comes any more: its decay is
# below half of the last bit.
MAX_BFLOAT16_DECAY = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamGroup(Section):
    """Settings of the parameters whose names match a pattern."""

    match: Annotated[str, "parameters by name; * stands for any text, as in `*router*`"]
    name: Annotated[str, "name of the group in metrics; empty: the default groups"] = ""
    lr_scale: Annotated[PositiveOrZero, "multiplies the learning rate"] = 1.0
    weight_decay: Annotated[PositiveOrZero | None, "replaces optimizer.weight_decay"] = None
    frozen: Annotated[bool, "do not train: no gradient, no moments"] = False

    def __post_init__(self) -> None:
        if self.frozen and (self.lr_scale != 1 or self.weight_decay is not None):
            problem = "frozen and with a learning rate or decay of its own"
            right = "frozen: true alone would work"
            raise ConfigError(f"optimizer.param_groups has {self.match} {problem}; {right}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The optimizer and its learning rate, after clipping by global norm."""

    name: Annotated[
        Literal["adamw", "adafactor", "lion", "muon"],
        "update rule; muon: for attention and experts, with adamw for the rest",
    ] = "adamw"
    peak_lr: Annotated[Positive, "peak learning rate, reached after warmup_steps"] = 3e-4
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        "decay after warm-up; wsd: constant, then linear over the last decay_steps",
    ] = "cosine"
    min_lr_ratio: Annotated[Share, "final learning rate, relative to peak_lr"] = 0.1
    warmup_steps: Annotated[CountOrZero, "steps of linear warm-up"] = 100
    decay_steps: Annotated[CountOrZero, "steps of the linear decay at the end of wsd"] = 0
    beta1: Annotated[Share, "decay of the first moment; 0 with adafactor: no first moment"] = 0.9
    beta2: Annotated[Share, "decay of the second moment; with lion: of its momentum"] = 0.95
    epsilon: Annotated[Positive, "epsilon of adamw"] = 1e-8
    muon_momentum: Annotated[Share, "decay of muon's momentum"] = 0.95
    moments_dtype: Annotated[
        Literal["float32", "bfloat16"], "dtype of moments; of adafactor's second always float32"
    ] = "float32"
    offload: Annotated[bool, "keep moments in host memory between steps"] = False
    weight_decay: Annotated[PositiveOrZero, "decoupled decay, of matrices; not of norms"] = 0.1
    max_grad_norm: Annotated[Positive, "gradients are clipped to this global norm"] = 1.0
    param_groups: Annotated[tuple[ParamGroup, ...], "settings by name; first match applies"] = ()
    ema_decay: Annotated[Share, "decay of an average of the weights; 0: none"] = 0.0

    def __post_init__(self) -> None:
        if self.ema_decay == 1:
            raise bad_value("optimizer.ema_decay", 1.0, "would keep the initial weights", 0.999)
        is_wsd, ratios = self.schedule == "wsd", (1, self.default("min_lr_ratio"))
        if is_wsd != (self.decay_steps > 0):
            fix = "optimizer.decay_steps=100" if is_wsd else "optimizer.schedule=wsd"
            schedule = f"optimizer.schedule={self.schedule}"
            right = f"it is wsd that decays over the last steps; {fix} would work"
            raise ConfigError(f"optimizer.decay_steps={self.decay_steps} and {schedule}: {right}.")
        if self.schedule == "constant" and self.min_lr_ratio not in ratios:
            problem = f"optimizer.min_lr_ratio={self.min_lr_ratio} is not reached"
            right = "with optimizer.schedule=constant; optimizer.schedule=linear would work"
            raise ConfigError(f"{problem} {right}.")
        for key, readers in {"epsilon": ("adamw", "muon"), "muon_momentum": ("muon",)}.items():
            value, default = getattr(self, key), self.default(key)
            if value != default and self.name not in readers:
                problem = f"is nothing that optimizer.name={self.name} has"
                raise bad_value(f"optimizer.{key}", value, problem, default)
        for key in ("beta1", "beta2", "muon_momentum"):
            if self.moments_dtype == "bfloat16" and getattr(self, key) > MAX_BFLOAT16_DECAY:
                fix = f"{MAX_BFLOAT16_DECAY} or optimizer.moments_dtype=float32"
                problem = "decays by less than bfloat16's 8 bits can hold"
                raise bad_value(f"optimizer.{key}", getattr(self, key), problem, fix)
