"""A whole run: all sections together, and what of them does not go together."""

import dataclasses
import math
from typing import Annotated, Literal

from grok.config.data import DataConfig
from grok.config.mesh import MeshConfig, check_model_fits, resolve_mesh
from grok.config.model import GrokConfig
from grok.config.numbers import Count, CountOrZero, round_up
from grok.config.optimizer import OptimizerConfig
from grok.config.section import Section
from grok.config.train import CheckpointConfig, LoraConfig, TrainConfig
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """Memory of inference: concurrent sequences, and the paged cache of keys and values.

    `max_num_seqs` and `num_pages` are totals over the mesh's batch groups.
    """

    max_num_seqs: Annotated[Count, "sequences that are decoded at a time"] = 8
    page_size: Annotated[Count, "tokens of a page of the cache"] = 32
    num_pages: Annotated[
        CountOrZero, "pages of the cache; 0: enough for max_num_seqs at full length"
    ] = 0
    prefill_chunk_size: Annotated[
        Count, "prompt tokens that one step computes, on each data replica"
    ] = 256
    cache_dtype: Annotated[
        Literal["compute", "float32", "bfloat16", "int8"],
        "type of cached keys and values; compute: as model.compute_dtype",
    ] = "compute"

    def __post_init__(self) -> None:
        if self.prefill_chunk_size % self.page_size:
            raise ConfigError(
                f"engine.prefill_chunk_size={self.prefill_chunk_size} is no multiple of "
                f"engine.page_size={self.page_size}; engine.prefill_chunk_size="
                f"{round_up(self.prefill_chunk_size, self.page_size)} would work."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Section):
    """What `grok plan` compiles, and for which slice."""

    program: Annotated[
        Literal["train", "prefill", "decode"],
        "compiled step: of training, over prompts, or one token per row",
    ] = "train"
    topology: Annotated[str, "TPU slice, such as v5p:4x4x8; --topology overrides it"] = ""
    batch_size: Annotated[Count, "rows of a prefill or decode step"] = 8
    tokens: Annotated[Count, "tokens per row: of a prompt, or in the KV cache when decoding"] = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A whole run; what `grok train`, `grok config` and `grok.load_config` work with."""

    model: Annotated[GrokConfig, "the decoder: dimensions, arithmetic, dtypes"]
    folder: Annotated[str, "folder of the run: checkpoints, metrics, resolved config"] = (
        "runs/default"
    )
    mesh: Annotated[MeshConfig, "devices along each mesh axis; one may be -1: all that remain"] = (
        MeshConfig()
    )
    data: Annotated[DataConfig, "training and validation data, and batches"] = DataConfig()
    optimizer: Annotated[OptimizerConfig, "optimizer and learning-rate schedule"] = (
        OptimizerConfig()
    )
    train: Annotated[TrainConfig, "length, losses, safeguards and reports"] = TrainConfig()
    lora: Annotated[LoraConfig, "low-rank adapters, trained instead of the weights"] = LoraConfig()
    checkpoint: Annotated[CheckpointConfig, "when checkpoints are saved, and which are kept"] = (
        CheckpointConfig()
    )
    engine: Annotated[EngineConfig, "inference: concurrent sequences and KV cache"] = EngineConfig()
    plan: Annotated[PlanConfig, "what `grok plan` compiles, and for which slice"] = PlanConfig()

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
                if value != PlanConfig.default(key):
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
            f"{rows}; data.batch_size={round_up(config.data.batch_size, rows)} would work."
        )
    rows *= config.train.grad_accum_steps
    if config.data.batch_size % rows:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} cannot be split into train.grad_accum_steps="
            f"{config.train.grad_accum_steps} microbatches over slice*data*expert="
            f"{rows // config.train.grad_accum_steps}; data.batch_size="
            f"{round_up(config.data.batch_size, rows)} would work."
        )
    for step, batch_size, length in config.data.shapes():
        if batch_size % rows:
            up = round_up(batch_size, math.lcm(rows, config.data.sequence_length // length))
            raise ConfigError(
                f"data.batch_schedule has batch_size={batch_size} from step {step}, which cannot "
                f"be split over slice*data*expert*train.grad_accum_steps={rows}; {up} would work."
            )
    return sizes


def check_trainable(config: RunConfig) -> None:
    """Refuse, as ConfigError, to train a model that cannot be trained."""
    if config.model.param_dtype == "int8":
        raise ConfigError(
            "model.param_dtype=int8 is for inference, and int8 matrices have no gradient; "
            "model.param_dtype=float32 would work."
        )
