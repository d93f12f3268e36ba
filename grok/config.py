"""What a run is: frozen dataclasses, checked before anything slow starts.

The sections below are the whole list of keys; `grok.config_files` reads them from YAML. Nothing
here imports JAX. A refusal is a `ConfigError`: one sentence with the key, the numbers, and a value
that would work.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from grok.errors import ConfigError

Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

MESH_AXES = ("slice", "data", "expert", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrokConfig:
    """Shape and arithmetic of a Grok-1 model. Defaults are the release's where it has one value."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    vocab_size: Annotated[Count, Field(description="entries of the token table (V)")]
    num_layers: Annotated[Count, Field(description="blocks (L)")]
    embed_dim: Annotated[Count, Field(description="width of the residual stream (D)")]
    mlp_dim: Annotated[Count, Field(description="hidden width of one expert (F)")]
    num_heads: Annotated[Count, Field(description="query heads (N)")]
    num_kv_heads: Annotated[Count, Field(description="key/value heads (K); N/K queries share one")]
    head_dim: Annotated[Count, Field(description="width of one head (H); even, for rotary pairs")]
    num_experts: Annotated[Count, Field(description="experts of a block (E)")] = 8
    num_selected_experts: Annotated[
        Count, Field(description="experts that each token goes to (C)")
    ] = 2
    context_length: Annotated[Count, Field(description="longest sequence, in tokens")] = 8192
    embedding_multiplier: Annotated[
        Positive, Field(description="factor on the embedding; default sqrt(embed_dim)")
    ] = None  # type: ignore[assignment]  # filled in __post_init__
    output_multiplier: Annotated[Positive, Field(description="factor on the final logits")] = (
        0.5773502691896257
    )
    attn_output_multiplier: Annotated[
        Positive, Field(description="factor on attention logits; default 1/sqrt(head_dim)")
    ] = None  # type: ignore[assignment]  # filled in __post_init__
    attn_logit_softcap: Annotated[
        Positive, Field(description="c of c*tanh(x/c), applied to attention logits")
    ] = 30.0
    rope_theta: Annotated[Positive, Field(description="base of the rotary wavelengths")] = 10000.0
    param_dtype: Annotated[
        Literal["float32", "bfloat16", "int8"],
        Field(description="type that parameters are kept in; int8: matrices, to infer only"),
    ] = "float32"
    compute_dtype: Annotated[
        Literal["float32", "bfloat16"], Field(description="type of activations and products")
    ] = "bfloat16"
    remat: Annotated[
        Literal["none", "dots", "attention", "experts", "full"],
        Field(
            description="recompute in backward: nothing, all but matrix products, all but what "
            "attention gave, all but what the experts gave, whole blocks"
        ),
    ] = "full"

    def __post_init__(self) -> None:
        if self.embedding_multiplier is None:
            object.__setattr__(self, "embedding_multiplier", math.sqrt(self.embed_dim))
        if self.attn_output_multiplier is None:
            object.__setattr__(self, "attn_output_multiplier", 1 / math.sqrt(self.head_dim))
        if self.num_heads % self.num_kv_heads:
            near = largest_divisor(self.num_heads, self.num_kv_heads)
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"model.num_heads={self.num_heads}; model.num_kv_heads={near} would work."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} is odd, and rotary embedding turns pairs; "
                f"model.head_dim={self.head_dim + 1} would work."
            )
        if self.num_selected_experts > self.num_experts:
            raise ConfigError(
                f"model.num_selected_experts={self.num_selected_experts} is more than "
                f"model.num_experts={self.num_experts}; "
                f"model.num_selected_experts={self.num_experts} would work."
            )

    @property
    def float_dtype(self) -> str:
        """Type of the parameters that are not int8, and of those that int8 ones are made from."""
        return "float32" if self.param_dtype == "int8" else self.param_dtype

    def num_parameters(self) -> int:
        """All parameters of the model: table, blocks, final norm."""
        return self._count(self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters that one token uses: all but the experts it was not sent to."""
        return self._count(self.num_selected_experts)

    def _count(self, experts: int) -> int:
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        router = self.embed_dim * self.num_experts
        moe = 3 * experts * self.embed_dim * self.mlp_dim
        block = attention + router + moe + 4 * self.embed_dim
        return self.vocab_size * self.embed_dim + self.num_layers * block + self.embed_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis has; one may be -1: all that remain."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    slice: Annotated[int, Field(description="replicas joined by the data-centre network")] = 1
    data: Annotated[int, Field(description="batch, and parameters sharded over it; -1: rest")] = -1
    expert: Annotated[int, Field(description="width of the experts, and the batch")] = 1
    tensor: Annotated[int, Field(description="heads, expert width and vocabulary")] = 1
    simulated_devices: Annotated[
        CountOrZero, Field(description="CPU devices to simulate, over all hosts; 0: real ones")
    ] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset of the mixture."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    path: Annotated[str, Field(description="folder that `grok data prepare` wrote")]
    weight: Annotated[PositiveOrZero, Field(description="rows from here, relative to the rest")] = (
        1.0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureChange:
    """Weights of the mixture from a step on."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    from_step: Annotated[Count, Field(description="first step with these weights")]
    weights: Annotated[
        tuple[PositiveOrZero, ...], Field(description="one for each of data.datasets")
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeChange:
    """Shape of a batch from a step on; what is left out stays as it was."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    from_step: Annotated[CountOrZero, Field(description="first step, from 0, of this shape")]
    batch_size: Annotated[Count | None, Field(description="rows of a batch (B)")] = None
    sequence_length: Annotated[
        Count | None, Field(description="tokens a row (T), a divisor of data.sequence_length")
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and the shape of a batch."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    train: Annotated[tuple[str, ...], Field(description="text files to train on (UTF-8)")] = ()
    validation: Annotated[
        tuple[str, ...], Field(description="text files held out for the validation pass")
    ] = ()
    datasets: Annotated[
        tuple[DatasetConfig, ...],
        Field(description="prepared datasets to train on, in place of text: {path, weight} each"),
    ] = ()
    mixture_changes: Annotated[
        tuple[MixtureChange, ...],
        Field(description="other weights from a step on: {from_step, weights} each"),
    ] = ()
    validation_dataset: Annotated[
        str, Field(description="prepared dataset for the validation pass, in place of text")
    ] = ""
    packing: Annotated[
        Literal["continue", "cut"],
        Field(
            description="what a document does that does not fit a row: goes on in the next, ends"
        ),
    ] = "continue"
    allow_changed: Annotated[
        bool, Field(description="resume although the prepared datasets are others than before")
    ] = False
    tokenizer: Annotated[str, Field(description="SentencePiece model file")] = ""
    sequence_length: Annotated[Count, Field(description="tokens a row (T), at its longest")] = 1024
    batch_size: Annotated[Count, Field(description="rows of a batch over all devices (B)")] = 8
    shape_changes: Annotated[
        tuple[ShapeChange, ...],
        Field(description="others from a step on: {from_step, batch_size, sequence_length} each"),
    ] = ()
    seed: Annotated[CountOrZero, Field(description="seed of the order of rows")] = 0
    prefetch: Annotated[
        CountOrZero, Field(description="batches made ahead, each in a thread; 0: none")
    ] = 2

    def __post_init__(self) -> None:
        if self.train and self.datasets:
            raise ConfigError(
                "data.train and data.datasets are both set, and a run reads text files or prepared "
                "datasets; data.train=[] would work."
            )
        if self.validation and self.validation_dataset:
            raise ConfigError(
                "data.validation and data.validation_dataset are both set; data.validation=[] "
                "would work."
            )
        paths = [dataset.path for dataset in self.datasets]
        for path in paths:
            if paths.count(path) > 1:
                raise ConfigError(
                    f"data.datasets names {path} twice; once, with the sum of the weights, would "
                    "work."
                )
        if self.datasets and not any(dataset.weight for dataset in self.datasets):
            raise ConfigError(
                "data.datasets have no weight above 0; weight: 1 for one of them would work."
            )
        before = 0
        for change in self.mixture_changes:
            if len(change.weights) != len(paths) or not any(change.weights):
                raise ConfigError(
                    f"data.mixture_changes has {list(change.weights)} from step {change.from_step},"
                    f" and data.datasets has {len(paths)} datasets; as many weights, one of them "
                    "above 0, would work."
                )
            if change.from_step <= before:
                raise ConfigError(
                    f"data.mixture_changes has from_step={change.from_step} after {before}; steps "
                    "that increase would work."
                )
            before = change.from_step
        self._check_shapes()

    def shapes(self) -> list[tuple[int, int, int]]:
        """Every shape of a batch: the first step that has it, B and T."""
        shapes = [(0, self.batch_size, self.sequence_length)]
        for change in self.shape_changes:
            _, batch_size, sequence_length = shapes[-1]
            shapes.append(
                (
                    change.from_step,
                    change.batch_size or batch_size,
                    change.sequence_length or sequence_length,
                )
            )
        return shapes

    def _check_shapes(self) -> None:
        before = -1
        for change, (step, batch_size, length) in zip(
            self.shape_changes, self.shapes()[1:], strict=True
        ):
            if step <= before:
                raise ConfigError(
                    f"data.shape_changes has from_step={step} after {before}; steps that increase "
                    "would work."
                )
            before = step
            if change.batch_size is None and change.sequence_length is None:
                raise ConfigError(
                    f"data.shape_changes changes nothing from step {step}; a batch_size, a "
                    "sequence_length, or both would work."
                )
            if self.sequence_length % length:
                near = largest_divisor(self.sequence_length, length)
                raise ConfigError(
                    f"data.shape_changes has sequence_length={length} from step {step}, which does "
                    f"not divide the longest, data.sequence_length={self.sequence_length}; {near} "
                    "would work."
                )
            parts = self.sequence_length // length
            if batch_size % parts:
                raise ConfigError(
                    f"data.shape_changes has batches of {batch_size} x {length} tokens from step "
                    f"{step}, which are no whole rows of data.sequence_length="
                    f"{self.sequence_length}; batch_size={_up(batch_size, parts)} would work."
                )


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
    final_lr_share: Annotated[Share, Field(description="last learning rate over peak_lr")] = 0.1
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
    weight_decay: Annotated[
        PositiveOrZero, Field(description="decoupled decay of matrices (norm scales have none)")
    ] = 0.1
    clip_norm: Annotated[Positive, Field(description="largest global norm of a gradient")] = 1.0
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
        if self.schedule == "constant" and self.final_lr_share not in (
            1,
            self._default("final_lr_share"),
        ):
            raise ConfigError(
                f"optimizer.final_lr_share={self.final_lr_share} is not reached with "
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
    accumulate: Annotated[
        Count, Field(description="microbatches that a step splits its batch into, one by one")
    ] = 1
    skip_spikes_above: Annotated[
        PositiveOrZero,
        Field(description="skip steps with a gradient this many times its usual norm; 0: none"),
    ] = 0.0
    stop_after_bad: Annotated[
        Count, Field(description="bad steps in a row after which the run gives up")
    ] = 10
    return_after_bad: Annotated[
        bool,
        Field(description="go back to the last good checkpoint then, and leave those batches out"),
    ] = False
    log_every: Annotated[Count, Field(description="steps between lines of metrics.jsonl")] = 10
    eval_every: Annotated[
        CountOrZero, Field(description="steps between validation passes; 0: only at the end")
    ] = 0
    hang_seconds: Annotated[
        CountOrZero,
        Field(description="a run of which no step ends for so long is ended, to restart; 0: never"),
    ] = 1800
    heartbeat_seconds: Annotated[
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
        if 0 < self.skip_spikes_above <= 1:
            raise ConfigError(
                f"train.skip_spikes_above={self.skip_spikes_above} would skip usual steps; "
                "train.skip_spikes_above=10 would work."
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How inference uses memory: slots for answers, and a cache of keys and values in pages.

    Slots and pages are of all groups of devices together that see other tokens.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    slots: Annotated[Count, Field(description="answers that are continued at a time")] = 8
    page_size: Annotated[Count, Field(description="tokens of a page of the cache")] = 32
    pages: Annotated[
        CountOrZero,
        Field(description="pages of the cache; 0: as many as all slots need at full length"),
    ] = 0
    prefill_chunk: Annotated[
        Count, Field(description="tokens of prompts that one step takes in, on each data replica")
    ] = 256
    cache_dtype: Annotated[
        Literal["compute", "float32", "bfloat16", "int8"],
        Field(description="type of cached keys and values; compute: as model.compute_dtype"),
    ] = "compute"

    def __post_init__(self) -> None:
        if self.prefill_chunk % self.page_size:
            raise ConfigError(
                f"engine.prefill_chunk={self.prefill_chunk} is no multiple of engine.page_size="
                f"{self.page_size}; engine.prefill_chunk={_up(self.prefill_chunk, self.page_size)} "
                "would work."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `grok plan` compiles, and for which slice."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    program: Annotated[
        Literal["train", "prefill", "decode"],
        Field(description="the training step, a step over prompts, a step of one token a row"),
    ] = "train"
    topology: Annotated[str, Field(description="slice, such as v5p:4x4x8; --topology wins")] = ""
    batch_size: Annotated[Count, Field(description="rows of a prefill or decode step")] = 8
    tokens: Annotated[
        Count, Field(description="tokens a row: of a prompt, or in the cache when decoding")
    ] = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run; what `grok train`, `grok config` and `grok.load_config` work with."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    model: Annotated[GrokConfig, Field(description="shape and arithmetic of the model")]
    folder: Annotated[str, Field(description="the run's folder: checkpoints, metrics, config")] = (
        "runs/default"
    )
    mesh: Annotated[MeshConfig, Field(description="devices along each axis")] = MeshConfig()
    data: Annotated[DataConfig, Field(description="text and batches")] = DataConfig()
    optimizer: Annotated[OptimizerConfig, Field(description="AdamW and its schedule")] = (
        OptimizerConfig()
    )
    train: Annotated[TrainConfig, Field(description="length, losses, reports")] = TrainConfig()
    lora: Annotated[LoraConfig, Field(description="adapters in place of all weights")] = (
        LoraConfig()
    )
    checkpoint: Annotated[CheckpointConfig, Field(description="saves")] = CheckpointConfig()
    engine: Annotated[EngineConfig, Field(description="inference: slots, cache")] = EngineConfig()
    plan: Annotated[PlanConfig, Field(description="what `grok plan` compiles")] = PlanConfig()

    def __post_init__(self) -> None:
        if self.data.sequence_length > self.model.context_length:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} is longer than "
                f"model.context_length={self.model.context_length}; "
                f"data.sequence_length={self.model.context_length} would work."
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} leaves nothing of "
                f"train.steps={self.train.steps}; "
                f"optimizer.warmup_steps={self.train.steps // 10} would work."
            )
        stable = self.train.steps - self.optimizer.warmup_steps
        if self.optimizer.decay_steps > stable:
            raise ConfigError(
                f"optimizer.decay_steps={self.optimizer.decay_steps} is more than the {stable} "
                f"steps of train.steps={self.train.steps} after optimizer.warmup_steps="
                f"{self.optimizer.warmup_steps}; optimizer.decay_steps={stable} would work."
            )
        if self.checkpoint.keep_best:
            self._check_validated()
        if self.lora.rank and not self.train.init_from:
            raise ConfigError(
                f"lora.rank={self.lora.rank} adapts weights that are there already, and "
                "train.init_from names none; train.init_from=WEIGHTS, or lora.rank=0, would work."
            )
        if self.lora.rank and self.optimizer.name == "muon":
            raise ConfigError(
                f"optimizer.name=muon makes updates of whole matrices orthogonal, and lora.rank="
                f"{self.lora.rank} trains factors of them; optimizer.name=adamw would work."
            )
        self._check_planned()
        if self.mesh.simulated_devices:
            check_fits(self, self.mesh.simulated_devices)

    def _check_planned(self) -> None:
        """Refuses what `grok plan` would not read, and rows longer than the model's context."""
        if self.plan.program == "train":
            for key, instead in {"batch_size": "batch_size", "tokens": "sequence_length"}.items():
                value = getattr(self.plan, key)
                if value != PlanConfig.__dataclass_fields__[key].default:
                    raise ConfigError(
                        f"plan.{key}={value} is of plan.program=prefill or decode, and a training "
                        f"step has data.{instead}={getattr(self.data, instead)}; "
                        f"data.{instead}={value} would work."
                    )
        elif self.plan.tokens > self.model.context_length:
            raise ConfigError(
                f"plan.tokens={self.plan.tokens} is more than model.context_length="
                f"{self.model.context_length}; plan.tokens={self.model.context_length} would work."
            )

    def _check_validated(self) -> None:
        """Refuses to look for the best checkpoint among some that nothing is known of."""
        best, every = self.checkpoint.keep_best, self.checkpoint.every
        if not (self.data.validation or self.data.validation_dataset):
            raise ConfigError(
                f"checkpoint.keep_best={best} needs validation passes, and neither data.validation "
                "nor data.validation_dataset names data; checkpoint.keep_best=0 would work."
            )
        if not self.train.eval_every or every % self.train.eval_every:
            raise ConfigError(
                f"checkpoint.keep_best={best} needs a validation pass at each checkpoint, and "
                f"train.eval_every={self.train.eval_every} has none at some multiples of "
                f"checkpoint.every={every}; train.eval_every={every} would work."
            )


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no more than `at_most`."""
    return max(d for d in range(1, at_most + 1) if number % d == 0)


def _up(number: int, factor: int) -> int:
    """The least multiple of `factor` that is no less than `number`."""
    return -(-number // factor) * factor


def resolve_mesh(
    mesh: MeshConfig, num_devices: int, model: GrokConfig | None = None
) -> dict[str, int]:
    """Sizes of the four mesh axes on `num_devices` devices, with -1 filled in.

    Raises ConfigError when a size is not positive, more than one is -1, or they do not multiply
    to the number of devices. The mesh that it then proposes suits `model`, where one is given.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(
                f"mesh.{axis}={size} is no number of devices; mesh.{axis}=1 would work."
            )
    if len(open_axes) > 1:
        raise ConfigError(
            f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1, and only one axis can take "
            f"the devices that remain; mesh.{open_axes[1]}=1 would work."
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and num_devices % given == 0:
        sizes[open_axes[0]] = num_devices // given
    elif open_axes or given != num_devices:
        raise ConfigError(
            f"mesh {_x(sizes)} needs {'a multiple of ' if open_axes else ''}{given} devices, and "
            f"there are {num_devices}; mesh {_x(_nearest_mesh(sizes, num_devices, model))} "
            "would work."
        )
    return sizes


def check_fits(config: RunConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, after checking that model and batch can be split over them.

    Raises ConfigError with the numbers and a value that would work.
    """
    sizes = resolve_mesh(config.mesh, num_devices, config.model)
    check_model_fits(config.model, sizes)
    rows = sizes["slice"] * sizes["data"] * sizes["expert"]
    if config.data.batch_size % rows:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} cannot be split over slice*data*expert="
            f"{rows}; data.batch_size={_up(config.data.batch_size, rows)} would work."
        )
    rows *= config.train.accumulate
    if config.data.batch_size % rows:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} cannot be split into train.accumulate="
            f"{config.train.accumulate} microbatches over slice*data*expert="
            f"{rows // config.train.accumulate}; data.batch_size="
            f"{_up(config.data.batch_size, rows)} would work."
        )
    for step, batch_size, length in config.data.shapes():
        if batch_size % rows:
            up = _up(batch_size, math.lcm(rows, config.data.sequence_length // length))
            raise ConfigError(
                f"data.shape_changes has batch_size={batch_size} from step {step}, which cannot be "
                f"split over slice*data*expert*train.accumulate={rows}; {up} would work."
            )
    return sizes


def check_trainable(config: RunConfig) -> None:
    """Refuse, as ConfigError, to train a model that cannot be trained."""
    if config.model.param_dtype == "int8":
        raise ConfigError(
            "model.param_dtype=int8 is for inference, and int8 matrices have no gradient; "
            "model.param_dtype=float32 would work."
        )


def check_model_fits(model: GrokConfig, sizes: dict[str, int]) -> None:
    """Refuse, as ConfigError, a mesh over which an axis of the model cannot be split evenly."""
    problem = _misfit(model, sizes)
    if problem:
        near = _nearest_mesh(sizes, math.prod(sizes.values()), model)
        raise ConfigError(f"{problem}; mesh {_x(near)} would work.")


def _misfit(model: GrokConfig, sizes: dict[str, int]) -> str:
    """Which axis of the model cannot be split over the mesh; empty when all can."""
    tensor, expert, shards = sizes["tensor"], sizes["expert"], sizes["data"] * sizes["expert"]
    rules = (
        ("num_heads", model.num_heads, "mesh.tensor", tensor),
        ("mlp_dim", model.mlp_dim, "mesh.expert*mesh.tensor", expert * tensor),
        ("vocab_size", model.vocab_size, "mesh.tensor", tensor),
        ("embed_dim", model.embed_dim, "mesh.data*mesh.expert", shards),
    )
    for key, number, axes, size in rules:
        if number % size:
            return f"model.{key}={number} cannot be split over {axes}={size}"
    kv_heads = model.num_kv_heads
    if kv_heads % tensor and tensor % kv_heads:
        return (
            f"model.num_kv_heads={kv_heads} can be neither split nor repeated over "
            f"mesh.tensor={tensor}"
        )
    return ""


def _nearest_mesh(
    wanted: dict[str, int], num_devices: int, model: GrokConfig | None
) -> dict[str, int]:
    """The mesh of exactly `num_devices` that suits `model` and is nearest to `wanted`.

    Replicas change last; of the others, data takes what the rest leaves. One always exists:
    whole replicas on single devices.
    """
    meshes = (
        {"slice": slices, "data": num_devices // (slices * expert * tensor)}
        | {"expert": expert, "tensor": tensor}
        for slices in _divisors(num_devices)
        for expert in _divisors(num_devices // slices)
        for tensor in _divisors(num_devices // (slices * expert))
    )

    def distance(sizes: dict[str, int]) -> tuple[float, float]:
        apart = {axis: abs(math.log(sizes[axis] / max(1, wanted[axis]))) for axis in sizes}
        return apart["slice"], apart["expert"] + apart["tensor"]

    return min((m for m in meshes if model is None or not _misfit(model, m)), key=distance)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _x(sizes: dict[str, int]) -> str:
    """`slice=1 x data=2 x ...` for messages."""
    return " x ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
