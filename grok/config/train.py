"""How a model is trained: optimizer, losses, adapters, checkpoints."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from grok.config.numbers import Count, CountOrZero, Positive, PositiveOrZero, Share
from grok.errors import ConfigError

# A moment in bfloat16 with more stays what it is where no gradient comes any more: its decay is
# below half of the last bit.
MAX_BFLOAT16_DECAY = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerGroup:
    """What is different for the tensors whose names match a pattern."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    match: Annotated[
        str, Field(description="pattern of tensor names; * stands for any text, as in *router*")
    ]
    name: Annotated[
        str, Field(description="name of the group in metrics; none: as without the group")
    ] = ""
    lr_scale: Annotated[PositiveOrZero, Field(description="factor on the learning rate")] = 1.0
    weight_decay: Annotated[
        PositiveOrZero | None, Field(description="in place of optimizer.weight_decay")
    ] = None
    frozen: Annotated[bool, Field(description="not trained: no gradient, no moments")] = False

    def __post_init__(self) -> None:
        if self.frozen and (self.lr_scale != 1 or self.weight_decay is not None):
            raise ConfigError(
                f"optimizer.groups has {self.match} frozen and with a learning rate or decay of "
                "its own; frozen: true alone would work."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate, after clipping by global norm."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: Annotated[
        Literal["adamw", "adafactor", "lion", "muon"],
        Field(description="muon: of attention and experts; the rest of the model has adamw"),
    ] = "adamw"
    peak_lr: Annotated[Positive, Field(description="learning rate after warm-up")] = 3e-4
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        Field(description="learning rate after warm-up; wsd: constant, then decay_steps of linear"),
    ] = "cosine"
    min_lr_ratio: Annotated[Share, Field(description="last learning rate over peak_lr")] = 0.1
    warmup_steps: Annotated[CountOrZero, Field(description="steps of linear warm-up")] = 100
    decay_steps: Annotated[CountOrZero, Field(description="last steps, in which wsd decays")] = 0
    beta1: Annotated[
        Share, Field(description="decay of the first moment; adafactor has none at 0")
    ] = 0.9
    beta2: Annotated[Share, Field(description="decay of the second moment; of lion's momentum")] = (
        0.95
    )
    epsilon: Annotated[Positive, Field(description="Adam's epsilon")] = 1e-8
    muon_momentum: Annotated[Share, Field(description="decay of muon's momentum")] = 0.95
    moments_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="type that moments are kept in; adafactor's second is float32"),
    ] = "float32"
    offload: Annotated[
        bool, Field(description="moments stay in the hosts' memory between steps")
    ] = False
    weight_decay: Annotated[
        PositiveOrZero, Field(description="decoupled decay of matrices (norm scales have none)")
    ] = 0.1
    max_grad_norm: Annotated[Positive, Field(description="largest global norm of a gradient")] = 1.0
    groups: Annotated[
        tuple[OptimizerGroup, ...],
        Field(description="tensors apart: {match, name, lr_scale, weight_decay, frozen} each"),
    ] = ()
    ema_decay: Annotated[
        Share, Field(description="decay of the weights' moving average, such as 0.999; 0: none")
    ] = 0.0

    def __post_init__(self) -> None:
        if self.ema_decay == 1:
            raise ConfigError(
                "optimizer.ema_decay=1.0 would keep the initial weights; optimizer.ema_decay=0.999 "
                "would work."
            )
        self._check_schedule()
        self._check_moments()

    def _check_schedule(self) -> None:
        """Refuse keys that the schedule would not read."""
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            works = (
                "optimizer.decay_steps=100" if self.schedule == "wsd" else "optimizer.schedule=wsd"
            )
            raise ConfigError(
                f"optimizer.decay_steps={self.decay_steps} and optimizer.schedule={self.schedule}: "
                f"it is wsd that decays over the last steps; {works} would work."
            )
        if self.schedule == "constant" and self.min_lr_ratio not in (
            1,
            self._default("min_lr_ratio"),
        ):
            raise ConfigError(
                f"optimizer.min_lr_ratio={self.min_lr_ratio} is not reached with "
                "optimizer.schedule=constant; optimizer.schedule=linear would work."
            )

    def _check_moments(self) -> None:
        """Refuse keys that the optimizer would not read, and moments that would stand still."""
        for key, readers in {"epsilon": ("adamw", "muon"), "muon_momentum": ("muon",)}.items():
            value, default = getattr(self, key), self._default(key)
            if value != default and self.name not in readers:
                raise ConfigError(
                    f"optimizer.{key}={value} is nothing that optimizer.name={self.name} has; "
                    f"optimizer.{key}={default} would work."
                )
        if self.moments_dtype == "float32":
            return
        for key in ("beta1", "beta2", "muon_momentum"):
            if getattr(self, key) > MAX_BFLOAT16_DECAY:
                raise ConfigError(
                    f"optimizer.{key}={getattr(self, key)} decays by less than bfloat16's 8 bits "
                    f"can hold; optimizer.{key}={MAX_BFLOAT16_DECAY} or "
                    "optimizer.moments_dtype=float32 would work."
                )

    @classmethod
    def _default(cls, key: str) -> Any:
        return cls.__dataclass_fields__[key].default


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length of the run, its losses, and how often it reports."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    steps: Annotated[Count, Field(description="optimizer steps of the whole run")] = 1000
    seed: Annotated[CountOrZero, Field(description="seed of the initial parameters")] = 0
    init_from: Annotated[
        str,
        Field(description="weights to start from: ckpt-0, Hugging Face, or a checkpoint of grok"),
    ] = ""
    z_loss: Annotated[
        PositiveOrZero, Field(description="weight of log(Z)^2 of the output softmax")
    ] = 0.0
    router_balance_loss: Annotated[
        PositiveOrZero, Field(description="weight of the expert load-balancing loss")
    ] = 0.0
    grad_accum_steps: Annotated[
        Count, Field(description="microbatches that a step splits its batch into, one by one")
    ] = 1
    grad_spike_factor: Annotated[
        PositiveOrZero,
        Field(description="skip steps with a gradient this many times its usual norm; 0: none"),
    ] = 0.0
    max_bad_steps: Annotated[
        Count, Field(description="bad steps in a row after which the run gives up")
    ] = 10
    rollback_on_divergence: Annotated[
        bool,
        Field(description="go back to the last good checkpoint then, and leave those batches out"),
    ] = False
    log_every: Annotated[Count, Field(description="steps between lines of metrics.jsonl")] = 10
    eval_every: Annotated[
        CountOrZero, Field(description="steps between validation passes; 0: only at the end")
    ] = 0
    hang_timeout_seconds: Annotated[
        CountOrZero,
        Field(description="a run of which no step ends for so long is ended, to restart; 0: never"),
    ] = 1800
    heartbeat_timeout_seconds: Annotated[
        Count, Field(description="a host not heard of for so long is lost, which ends the others")
    ] = 60
    tensorboard: Annotated[
        bool, Field(description="write TensorBoard's files too (the extra `tensorboard`)")
    ] = False
    wandb: Annotated[
        str, Field(description="project of Weights & Biases to send metrics to (the extra `wandb`)")
    ] = ""
    profile: Annotated[
        tuple[Count, ...],
        Field(description="first and last step to record a profile of, for XProf; []: none"),
    ] = ()

    def __post_init__(self) -> None:
        first, last = self.profile if len(self.profile) == 2 else (1, 0)
        if self.profile and not first <= last <= self.steps:
            start = max(1, min(20, self.steps - 2))
            raise ConfigError(
                f"train.profile={list(self.profile)} names no first and last step of the "
                f"{self.steps} of the run; train.profile=[{start}, {min(start + 2, self.steps)}] "
                "would work."
            )
        if 0 < self.grad_spike_factor <= 1:
            raise ConfigError(
                f"train.grad_spike_factor={self.grad_spike_factor} would skip usual steps; "
                "train.grad_spike_factor=10 would work."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the weights that train.init_from names."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    rank: Annotated[
        CountOrZero, Field(description="columns of an adapter's first factor; 0: no adapters")
    ] = 0
    alpha: Annotated[
        Positive, Field(description="what adapters add is multiplied by alpha/rank")
    ] = 16.0
    targets: Annotated[
        tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...],
        Field(description="matrices with adapters: of attention, and gate, up, down of experts"),
    ] = ("query", "key", "value", "out")

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora.targets={list(self.targets)} should name matrices, each once; "
                "lora.targets=[query, value] would work."
            )

    @property
    def scale(self) -> float:
        """Factor on what an adapter adds."""
        return self.alpha / max(1, self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and how many stay."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    every: Annotated[Count, Field(description="steps between saves (the last is saved too)")] = 500
    keep: Annotated[Count, Field(description="newest checkpoints that stay on disk")] = 3
    keep_every: Annotated[
        CountOrZero, Field(description="checkpoints of multiples of so many steps stay; 0: none")
    ] = 0
    keep_best: Annotated[
        CountOrZero, Field(description="checkpoints of the lowest best_metric that stay")
    ] = 0
    best_metric: Annotated[
        Literal["validation_loss", "validation_bits_per_byte"],
        Field(description="by what keep_best finds the best"),
    ] = "validation_loss"

    def __post_init__(self) -> None:
        if self.keep_every % self.every:
            up = -(-self.keep_every // self.every) * self.every
            raise ConfigError(
                f"checkpoint.keep_every={self.keep_every} is no multiple of checkpoint.every="
                f"{self.every}; checkpoint.keep_every={up} would work."
            )
