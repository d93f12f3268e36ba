"""Training and validation data, and the shape of batches."""

import dataclasses
from pathlib import PurePath
from typing import Annotated, Literal

from grok.config.section import (
    Count,
    CountOrZero,
    PathText,
    PositiveOrZero,
    Section,
    Seed,
    largest_divisor,
)
from grok.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig(Section):
    """A dataset of the mixture."""

    path: Annotated[PathText, "folder written by `grok data prepare`, here or at gs://"]
    weight: Annotated[PositiveOrZero, "rows drawn from it, relative to the other datasets"] = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureChange(Section):
    """Weights of the mixture from a step on."""

    from_step: Annotated[Count, "first step with these weights"]
    weights: Annotated[tuple[PositiveOrZero, ...], "a weight for each of data.datasets"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchChange(Section):
    """Shape of a batch from a step on."""

    from_step: Annotated[CountOrZero, "first step with this shape, counted from 0"]
    batch_size: Annotated[Count | None, "rows of a batch (B); null: unchanged"] = None
    sequence_length: Annotated[
        Count | None, "tokens per row (T), dividing the longest; null: same"
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Data to read, and the shape of a batch."""

    train: Annotated[
        tuple[PathText, ...], "UTF-8 text to train on: files, folders, patterns such as text/*.txt"
    ] = ()
    validation: Annotated[
        tuple[PathText, ...], "UTF-8 text held out for validation: files, folders, patterns"
    ] = ()
    datasets: Annotated[tuple[DatasetConfig, ...], "prepared datasets, instead of text files"] = ()
    mixture_schedule: Annotated[tuple[MixtureChange, ...], "changes of the datasets' weights"] = ()
    validation_dataset: Annotated[PathText, "prepared dataset for validation, instead of text"] = ""
    domains: Annotated[
        tuple[PathText, ...],
        "held-out text files or prepared datasets, each measured alone in every validation pass",
    ] = ()
    packing: Annotated[
        Literal["concat_then_split", "best_fit"], "documents longer than a row: split, or truncated"
    ] = "concat_then_split"
    allow_data_change: Annotated[bool, "resume though datasets differ from a checkpoint's"] = False
    tokenizer: Annotated[PathText, "tokenizer file, or a folder with one"] = ""
    sequence_length: Annotated[Count, "tokens per row (T), at its longest"] = 1024
    batch_size: Annotated[Count, "rows of the global batch (B)"] = 8
    batch_schedule: Annotated[tuple[BatchChange, ...], "changes of the batch's shape"] = ()
    seed: Annotated[Seed, "seed of the data order"] = 0
    cache_gib: Annotated[
        Count, "GiB of this host's disk for documents of each dataset at gs://"
    ] = 16
    prefetch: Annotated[CountOrZero, "batches prepared in advance, each in a thread; 0: none"] = 2

    def __post_init__(self) -> None:
        for text, datasets in {"train": "datasets", "validation": "validation_dataset"}.items():
            if getattr(self, text) and getattr(self, datasets):
                one = f"a run reads text files or prepared datasets; data.{text}=[] would work"
                raise ConfigError(f"data.{text} and data.{datasets} are both set, and {one}.")
        names = self.domain_names()
        for path, name in zip(self.domains, names, strict=True):
            if names.count(name) > 1:
                problem = f"data.domains={list(self.domains)} has two of the name {name!r}"
                raise ConfigError(f"{problem}; files of different names would work.")
            if not name:
                raise ConfigError(f"data.domains has {path!r}; a file's name would work.")
        paths = [dataset.path for dataset in self.datasets]
        for path in paths:
            if paths.count(path) > 1:
                raise ConfigError(f"data.datasets names {path} twice; once would work.")
        if self.datasets and not any(dataset.weight for dataset in self.datasets):
            raise ConfigError("data.datasets have no weight above 0; weight: 1 would work.")
        for change in self.mixture_schedule:
            if len(change.weights) != len(paths) or not any(change.weights):
                weights = f"{list(change.weights)} from step {change.from_step}"
                problem = f"data.mixture_schedule has {weights}, and data.datasets has {len(paths)}"
                right = "as many weights, not all of them 0, would work"
                raise ConfigError(f"{problem} datasets; {right}.")
        self._check_shapes()
        for key, earliest in (("mixture_schedule", 1), ("batch_schedule", 0)):
            before = earliest - 1
            for change in getattr(self, key):
                if change.from_step <= before:
                    problem = f"data.{key} has from_step={change.from_step} after {before}"
                    raise ConfigError(f"{problem}; steps that increase would work.")
                before = change.from_step

    def domain_names(self) -> list[str]:
        """The names of `domains` in metrics: those of the files or folders, without their ends."""
        return [PurePath(path.rstrip("/")).stem for path in self.domains]

    def shapes(self) -> list[tuple[int, int, int]]:
        """Every shape of a batch: the first step that has it, B and T."""
        shapes = [(0, self.batch_size, self.sequence_length)]
        for change in self.batch_schedule:
            _, B, T = shapes[-1]
            shapes.append((change.from_step, change.batch_size or B, change.sequence_length or T))
        return shapes

    def _check_shapes(self) -> None:
        for change in self.batch_schedule:
            if change.batch_size is None and change.sequence_length is None:
                problem = f"data.batch_schedule changes nothing from step {change.from_step}"
                right = "a batch_size, a sequence_length, or both would work"
                raise ConfigError(f"{problem}; {right}.")
        longest = f"data.sequence_length={self.sequence_length}"
        for step, B, T in self.shapes()[1:]:
            if self.sequence_length % T:
                problem = f"data.batch_schedule has sequence_length={T} from step {step}, which"
                right = f"{largest_divisor(self.sequence_length, T)} would work"
                raise ConfigError(f"{problem} does not divide the longest, {longest}; {right}.")
            per_row = self.sequence_length // T
            if B % per_row:  # read as whole rows of data.sequence_length, then split
                problem = f"data.batch_schedule has batches of {B} x {T} tokens from step {step}"
                right = f"batch_size={-(-B // per_row) * per_row} would work"
                raise ConfigError(f"{problem}, which are no whole rows of {longest}; {right}.")
