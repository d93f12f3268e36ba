"""The config of a run: all sections, and checks of keys across them."""

import dataclasses
from typing import Annotated, Literal

from grok.config.data import DataConfig
from grok.config.mesh import MeshConfig
from grok.config.model import ModelConfig
from grok.config.optimizer import OptimizerConfig
from grok.config.section import Count, CountOrZero, PathText, Section, round_up
from grok.config.train import CheckpointConfig, LoraConfig, TrainConfig
from grok.errors import ConfigError, bad_value


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """Concurrent sequences, and the paged KV cache; both totals over the mesh's batch groups."""

    max_num_seqs: Annotated[Count, "sequences that are decoded at a time"] = 8
    page_size: Annotated[Count, "tokens of a page of the cache"] = 32
    num_pages: Annotated[
        CountOrZero, "pages of the cache; 0: as max_num_seqs full rows, or their windows, need"
    ] = 0
    prefill_chunk_size: Annotated[
        CountOrZero, "prompt tokens of one step, on each data replica; 0: as the chip's speeds ask"
    ] = 0
    cache_dtype: Annotated[
        Literal["compute", "float32", "bfloat16", "int8"], "type of the cache; compute: model's"
    ] = "compute"

    def __post_init__(self) -> None:
        if self.prefill_chunk_size % self.page_size:
            near = round_up(self.prefill_chunk_size, self.page_size)
            problem = f"is no multiple of engine.page_size={self.page_size}"
            raise bad_value("engine.prefill_chunk_size", self.prefill_chunk_size, problem, near)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Section):
    """The step that `grok plan` compiles, and its slice."""

    program: Annotated[
        Literal["train", "prefill", "decode"], "step: of training, over prompts, or a token a row"
    ] = "train"
    topology: Annotated[str, "TPU slice, such as v5p:4x4x8; --topology overrides it"] = ""
    batch_size: Annotated[Count, "rows of a prefill or decode step"] = 8
    tokens: Annotated[Count, "tokens per row: of a prompt, or in the KV cache when decoding"] = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """The config of a run, as `grok train`, `grok plan` and `grok.load_config` read it."""

    model: Annotated[ModelConfig, "the decoder: dimensions, arithmetic, dtypes"]
    folder: Annotated[
        PathText, "folder of checkpoints, metrics and config; none: a new one, runs/CONFIG-TIME"
    ] = ""
    compile_cache: Annotated[
        PathText,
        "folder of compiled programs that all hosts share, or gs://; none: `compiled` in the "
        "run's folder where that is at gs:// or hosts are several, else the user's cache",
    ] = ""
    mesh: Annotated[MeshConfig, "devices along each mesh axis; -1: all that remain"] = MeshConfig()
    data: Annotated[DataConfig, "training and validation data, and batches"] = DataConfig()
    optimizer: Annotated[OptimizerConfig, "optimizer and learning rate"] = OptimizerConfig()
    train: Annotated[TrainConfig, "length, losses, safeguards and reports"] = TrainConfig()
    lora: Annotated[LoraConfig, "low-rank adapters, trained instead of the weights"] = LoraConfig()
    checkpoint: Annotated[CheckpointConfig, "checkpoints to save and keep"] = CheckpointConfig()
    engine: Annotated[EngineConfig, "inference: concurrent sequences and KV cache"] = EngineConfig()
    plan: Annotated[PlanConfig, "what `grok plan` compiles, and for which slice"] = PlanConfig()

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_plan()
        if self.checkpoint.keep_best:
            self._check_keep_best()
        if (rank := self.lora.rank) and not self.train.init_from:
            problem = f"lora.rank={rank} adapts weights, and train.init_from names none"
            raise ConfigError(f"{problem}; train.init_from=WEIGHTS, or lora.rank=0, would work.")
        if (balance := self.train.router_balance_loss) and self.model.moe is None:
            problem = "is of experts, and model.moe is null"
            raise bad_value("train.router_balance_loss", balance, problem, 0)
        if rank and self.optimizer.name == "muon":
            problem = f"makes updates of whole matrices orthogonal, and lora.rank={rank} trains"
            raise bad_value("optimizer.name", "muon", f"{problem} factors of them", "adamw")

    def _check_lengths(self) -> None:
        lengths = {"data.sequence_length": self.data.sequence_length}
        if self.plan.program != "train":
            lengths["plan.tokens"] = self.plan.tokens
        context = self.model.context_length
        for key, length in lengths.items():
            if length > context:
                problem = f"is longer than model.context_length={context}"
                raise bad_value(key, length, problem, context)
        steps, optimizer = self.train.steps, self.optimizer
        warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
        if warmup >= steps:
            problem = f"leaves nothing of train.steps={steps}"
            raise bad_value("optimizer.warmup_steps", warmup, problem, steps // 10)
        if decay > steps - warmup:
            after = f"of train.steps={steps} after optimizer.warmup_steps={warmup}"
            problem = f"is more than the {steps - warmup} steps {after}"
            raise bad_value("optimizer.decay_steps", decay, problem, steps - warmup)

    def _check_plan(self) -> None:
        for key, instead in {"batch_size": "batch_size", "tokens": "sequence_length"}.items():
            value = getattr(self.plan, key)
            if self.plan.program == "train" and value != PlanConfig.default(key):
                problem = f"plan.{key}={value} is of plan.program=prefill or decode, and a training"
                has = f"step has data.{instead}={getattr(self.data, instead)}"
                raise ConfigError(f"{problem} {has}; data.{instead}={value} would work.")

    def _check_keep_best(self) -> None:
        best, every = self.checkpoint.keep_best, self.checkpoint.every
        if not (self.data.validation or self.data.validation_dataset):
            neither = "neither data.validation nor data.validation_dataset names data"
            problem = f"needs validation passes, and {neither}"
            raise bad_value("checkpoint.keep_best", best, problem, 0)
        if not self.train.eval_every or every % self.train.eval_every:
            needs = f"checkpoint.keep_best={best} needs a validation pass at each checkpoint, and"
            has = f"has none at some multiples of checkpoint.every={every}"
            value = f"train.eval_every={self.train.eval_every} {has}"
            raise ConfigError(f"{needs} {value}; train.eval_every={every} would work.")


def check_servable(model: ModelConfig) -> None:
    """Refuses, as ConfigError, products in 8 bits of floats, which are for training."""
    if model.matmul_dtype != "compute" and not model.is_quantized:
        fixes = {"int8": "param_dtype=int8 beside it", "float8": "matmul_dtype=compute"}
        raise ConfigError(
            f"matmul_dtype={model.matmul_dtype} with param_dtype={model.param_dtype} is for "
            f"training, not to serve; {fixes[model.matmul_dtype]} would work."
        )


def check_trainable(config: RunConfig) -> None:
    """Refuses, as ConfigError, to train a model that cannot be trained."""
    if config.lora.rank and config.model.matmul_dtype != "compute":
        problem = f"has no gradient of the adapters of lora.rank={config.lora.rank}"
        raise bad_value("model.matmul_dtype", config.model.matmul_dtype, problem, "compute")
    if config.model.is_quantized and not config.lora.rank:
        problem = "is for inference or below adapters (lora.rank=16), and has no gradient"
        raise bad_value("model.param_dtype", config.model.param_dtype, problem, "float32")
    if config.model.embedding_dtype == "int8":
        problem = "is for inference, and has no gradient"
        raise bad_value("model.embedding_dtype", "int8", problem, "float")
