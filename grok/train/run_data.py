"""The data of a run, as its config names it, and the check that a resumed run has the same."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from grok.config import DataConfig, RunConfig
from grok.data.batch_schedule import Batch, BatchSchedule
from grok.data.dataset import TokenDataset
from grok.data.device_feed import StreamBatches, StreamValidation, TrainBatches
from grok.data.mixture import Mixture
from grok.data.packed_batches import PackedBatches, PackedValidation
from grok.data.text_stream import read_bytes, read_stream
from grok.data.tokenizers import load_tokenizer, token_bytes
from grok.errors import CheckpointError, DataError


class RunData(NamedTuple):
    """What a run reads.

    train: batches by step; validation: the batches of a pass, None without one; num_bytes: UTF-8
    bytes of what is predicted in it, None without one; hashes: path and manifest hash of
    every prepared dataset that is trained on, in order.
    """

    train: TrainBatches
    validation: Iterable[Batch] | None
    num_bytes: int | None
    hashes: list[dict[str, str]]


def read_data(config: RunConfig) -> RunData:
    """Opens what the config names; DataError when it is missing, or not for its tokenizer."""
    data, vocab_size = config.data, config.model.vocab_size
    if not data.train and not data.datasets:
        raise DataError(
            "data.train names no files and data.datasets no datasets; data.train=[text.txt] would "
            "name one."
        )
    if not data.tokenizer:
        raise DataError("data.tokenizer names no SentencePiece model; set it to a .model file.")
    tokenizer = load_tokenizer(data.tokenizer)
    shapes = BatchSchedule(data.sequence_length, data.batch_size, data.shapes()[1:])
    shape = {"sequence_length": data.sequence_length, "batch_size": data.batch_size}
    train: TrainBatches
    if data.datasets:
        datasets = {each.path: open_dataset(each.path, config) for each in data.datasets}
        hashes = [{"path": path, "hash": prepared.hash} for path, prepared in datasets.items()]
        mixture = mixture_of(data, shapes)
        train = PackedBatches(datasets, mixture, shapes, seed=data.seed, packing=data.packing)
    else:
        hashes = []
        stream = read_stream(data.train, tokenizer, vocab_size)
        train = StreamBatches(stream, shapes, seed=data.seed)
    if data.validation_dataset:
        packed = PackedValidation(open_dataset(data.validation_dataset, config), **shape)
        return RunData(train, packed, packed.num_bytes(token_bytes(tokenizer)), hashes)
    if data.validation:
        held_out = StreamValidation(read_stream(data.validation, tokenizer, vocab_size), **shape)
        return RunData(train, held_out, held_out.num_bytes, hashes)
    return RunData(train, None, None, hashes)


def open_dataset(path: str, config: RunConfig) -> TokenDataset:
    """A prepared dataset, after checking that it was made with the run's tokenizer."""
    prepared = TokenDataset(path)
    made_with, tokenizer = prepared.manifest["tokenizer"], config.data.tokenizer
    hash_ours = hashlib.sha256(read_bytes(tokenizer, "tokenizer file")).hexdigest()
    if made_with["sha256"] != hash_ours:
        raise DataError(
            f"dataset {path} was prepared with a tokenizer of SHA-256 {made_with['sha256'][:12]}, "
            f"and data.tokenizer={tokenizer} has {hash_ours[:12]}; the same tokenizer would work."
        )
    size, ours = made_with["vocab_size"], config.model.vocab_size
    if size > ours:
        raise DataError(
            f"dataset {path} may have tokens up to {size - 1}, but model.vocab_size={ours}; "
            f"model.vocab_size={size} would work."
        )
    return prepared


def mixture_of(data: DataConfig, shapes: BatchSchedule) -> Mixture:
    """The mixture of the config's datasets, by row of the run."""
    changes = [(shapes.first_row(each.from_step), each.weights) for each in data.mixture_schedule]
    return Mixture([each.weight for each in data.datasets], changes)


def check_unchanged(stored: list[dict[str, str]], hashes: list[dict[str, str]], where: str) -> None:
    """Refuse, as CheckpointError, to go on from the checkpoint `where` on other prepared datasets
    than it was trained on; a dataset may have moved."""
    if [each["hash"] for each in stored] != [each["hash"] for each in hashes]:
        raise CheckpointError(
            f"{where} was trained on {_names(stored)}, and the config now names {_names(hashes)}; "
            "the same data, or data.allow_data_change=true to continue with the new, would work."
        )


def _names(hashes: list[dict[str, str]]) -> str:
    """`data/a (manifest 0123456789ab) and ...` for messages."""
    named = [f"{each['path']} (manifest {each['hash'][:12]})" for each in hashes]
    return " and ".join(named) or "no prepared datasets"
