"""The data of a run, and the check that a resumed run has the same."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from grok import storage
from grok.config import RunConfig
from grok.data.batch_schedule import Batch, BatchSchedule, Mixture
from grok.data.dataset import TokenDataset
from grok.data.device_feed import TrainBatches
from grok.data.manifest import MANIFEST_FILE
from grok.data.packed_batches import PackedBatches, PackedValidation
from grok.data.stream_batches import StreamBatches, StreamValidation, read_stream
from grok.data.tokenizers import Tokenizer, load_tokenizer, start_ids, token_bytes
from grok.data.tokenizers.files import TEMPLATE_FILE
from grok.errors import CheckpointError, DataError

# Of a dataset's rows, without a word.
MAX_SHARE_WITHOUT_LOSS = 0.01


class HeldOut(NamedTuple):
    """Data that is not trained on: the batches of a pass, and the UTF-8 bytes that it predicts."""

    batches: Iterable[Batch]
    num_bytes: int


class RunData(NamedTuple):
    """The data of a run. train: batches by step. validation: the batches of a pass, and num_bytes:
    the UTF-8 bytes that it predicts; None without validation data. hashes: path and manifest hash
    of each prepared dataset that is trained on, in order. template: of the datasets' chats.
    notices: sentences on what may be amiss. domains: more held-out data by name."""

    train: TrainBatches
    validation: Iterable[Batch] | None
    num_bytes: int | None
    hashes: list[dict[str, str]]
    template: bytes | None = None
    notices: tuple[str, ...] = ()
    domains: Mapping[str, HeldOut] = MappingProxyType({})


def read_data(config: RunConfig) -> RunData:
    """Opens the config's data. DataError when it is missing or of another tokenizer."""
    data = config.data
    if not data.train and not data.datasets:
        problem = "data.train names no files, and data.datasets nothing"
        raise DataError(f"{problem}; a file, folder or pattern as in data.train=[text] would work.")
    if not data.tokenizer:
        raise DataError(f"data.tokenizer names no tokenizer; {_way_to_tokenizer(config)}.")
    tokenizer = load_tokenizer(data.tokenizer)
    schedule = BatchSchedule(data.sequence_length, data.batch_size, data.shapes()[1:])
    train: TrainBatches
    hashes, template = [], None
    notices: tuple[str, ...] = ()
    if data.datasets:
        datasets = open_datasets(config, tokenizer)
        hashes, template = dataset_hashes(datasets), chat_template(datasets.values())
        changes = [(schedule.first_row(m.from_step), m.weights) for m in data.mixture_schedule]
        mixture = Mixture([dataset.weight for dataset in data.datasets], changes)
        train = PackedBatches(datasets, mixture, schedule, seed=data.seed, packing=data.packing)
        notices = tuple(loss_notices(datasets, train, config))
    else:
        stream = read_stream(data.train, tokenizer, config.model.vocab_size)
        train = StreamBatches(stream, schedule, seed=data.seed)
    domains = {
        name: open_path(path, tokenizer, config)
        for name, path in zip(data.domain_names(), data.domains, strict=True)
    }
    if not data.validation_dataset and not data.validation:
        return RunData(train, None, None, hashes, template, notices, domains)
    held_out = open_held_out(data.validation, data.validation_dataset, tokenizer, config)
    return RunData(train, *held_out, hashes, template, notices, domains)


def _way_to_tokenizer(config: RunConfig) -> str:
    """The clause that says how to come by a tokenizer for the run's data."""
    if config.data.datasets:
        return f"data.tokenizer={config.data.datasets[0].path} has the one of that dataset"
    files = shlex.join(config.data.train)
    make = f"grok data tokenizer {files} --vocab-size {config.model.vocab_size} --out text.model"
    return f"`{make}` makes one of this text, and data.tokenizer=text.model names it"


def loss_notices(
    datasets: Mapping[str, TokenDataset], train: PackedBatches, config: RunConfig
) -> Iterator[str]:
    """Yields a sentence on each dataset of which some rows train nothing; DataError where none of
    its rows bears loss."""
    for path, dataset in datasets.items():
        counts = dataset.manifest["counts"]
        if counts["loss_tokens"] == counts["tokens"]:
            continue
        share, data = train.share_without_loss(path), config.data
        rows = f"rows of data.sequence_length={data.sequence_length} (data.packing={data.packing})"
        if share == 1:
            problem = f"dataset {path} has no token that bears loss in its {rows}"
            right = "a longer one, with room for the completions, would work"
            raise DataError(f"{problem}; {right}.")
        if share > MAX_SHARE_WITHOUT_LOSS:
            yield f"dataset {path}: {share:.0%} of its {rows} have no token that bears loss"


def chat_template(datasets: Iterable[TokenDataset]) -> bytes | None:
    """The chat template that the datasets' messages were written by; None where they have none.
    DataError where there are two."""
    templates: dict[bytes, str] = {}
    for dataset in datasets:
        if "chat" in dataset.manifest:
            path = storage.join(dataset.folder, TEMPLATE_FILE)
            templates.setdefault(storage.read_bytes(path, DataError), str(dataset.folder))
    if len(templates) > 1:
        first, second, *_ = templates.values()
        raise DataError(
            f"datasets {first} and {second} were written by two chat templates, and a model has "
            "one; `grok data prepare --chat-template` with the same for both would work."
        )
    return next(iter(templates), None)


def open_held_out(
    texts: Sequence[str], dataset: str, tokenizer: Tokenizer, config: RunConfig
) -> HeldOut:
    """Opens a dataset or else text files."""
    shape = {"sequence_length": config.data.sequence_length, "batch_size": config.data.batch_size}
    if dataset:
        packed = PackedValidation(open_dataset(dataset, tokenizer, config), **shape)
        first = token_bytes(tokenizer, first=True) if tokenizer.adds_bos else None
        if not (num_bytes := packed.num_bytes(token_bytes(tokenizer), first)):
            raise DataError(f"dataset {dataset} has no text to predict; one with text would work.")
        return HeldOut(packed, num_bytes)
    stream = read_stream(texts, tokenizer, config.model.vocab_size)
    return HeldOut(StreamValidation(stream, **shape), stream.num_bytes)


def open_path(path: str, tokenizer: Tokenizer, config: RunConfig) -> HeldOut:
    """Opens a text file or a prepared dataset."""
    is_dataset = storage.exists(storage.join(path, MANIFEST_FILE))
    return open_held_out([path], path if is_dataset else "", tokenizer, config)


def open_datasets(config: RunConfig, tokenizer: Tokenizer) -> dict[str, TokenDataset]:
    """The prepared datasets that a run is trained on, by path. DataError as of `open_dataset`."""
    return {d.path: open_dataset(d.path, tokenizer, config) for d in config.data.datasets}


def dataset_hashes(datasets: Mapping[str, TokenDataset]) -> list[dict[str, str]]:
    """The path of each dataset and the hash of its manifest, for the meta of checkpoints."""
    return [{"path": path, "hash": dataset.hash} for path, dataset in datasets.items()]


def open_dataset(path: str, tokenizer: Tokenizer, config: RunConfig) -> TokenDataset:
    """Opens a prepared dataset. DataError if its tokenizer is another, or larger than the model."""
    dataset = TokenDataset(path, config.data.cache_gib << 30)
    stored, name = dataset.manifest["tokenizer"], f"data.tokenizer={config.data.tokenizer}"
    if stored["sha256"] != (sha256 := tokenizer.files.sha256):
        raise DataError(
            f"dataset {path} was prepared with a tokenizer of SHA-256 {stored['sha256'][:12]}, "
            f"and {name} has {sha256[:12]}; the same tokenizer would work."
        )
    for key, ids in {"start_ids": start_ids(tokenizer), "eos_id": tokenizer.eos_id}.items():
        if stored.get(key, ids) != ids:
            problem = f"dataset {path} was prepared with {key}={stored[key]}, and {name} has {ids}"
            right = f"data.tokenizer={path}, with the settings of that time, would work"
            raise DataError(f"{problem}; {right}.")
    if stored["vocab_size"] > config.model.vocab_size:
        raise DataError(
            f"dataset {path} has tokens up to {stored['vocab_size'] - 1}, but model.vocab_size="
            f"{config.model.vocab_size}; model.vocab_size={stored['vocab_size']} would work."
        )
    return dataset


def check_unchanged(stored: list[dict], hashes: list[dict], checkpoint: str) -> None:
    """Raises CheckpointError if other prepared datasets are named; one may have moved."""
    if [dataset["hash"] for dataset in stored] != [dataset["hash"] for dataset in hashes]:
        raise CheckpointError(
            f"{checkpoint} was trained on {_names(stored)}, and the config now names "
            f"{_names(hashes)}; the same data, or data.allow_data_change=true, would work."
        )


def _names(hashes: list[dict[str, str]]) -> str:
    names = [f"{dataset['path']} (manifest {dataset['hash'][:12]})" for dataset in hashes]
    return " and ".join(names) or "no prepared datasets"
