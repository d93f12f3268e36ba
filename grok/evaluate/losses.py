"""Loss and bits per byte of weights on held-out texts: `grok eval --data`."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from grok import compiler
from grok.config import RunConfig
from grok.data.stream_batches import bits_per_byte
from grok.data.tokenizers import load_tokenizer
from grok.model.decoder import Decoder
from grok.train.loss import eval_step, total_loss
from grok.train.run_data import open_path


class TextLoss(NamedTuple):
    """Loss of a text: nats per token, and bits per UTF-8 byte, comparable across tokenizers."""

    data: str
    tokens: int
    bytes: int
    loss: float
    bits_per_byte: float


def evaluate_texts(
    model: Decoder, mesh: Mesh, paths: Sequence[str], tokenizer_file: str, config: RunConfig
) -> Iterable[TextLoss]:
    """The loss on each of these text files and token datasets, one after the other. Rows have the
    shape that `config.data` gives, and are split over the mesh. Raises DataError for one that
    cannot be read, has nothing to predict, or is of another tokenizer, before any is run."""
    data = dataclasses.replace(config.data, tokenizer=tokenizer_file)
    config = dataclasses.replace(config, data=data)
    tokenizer = load_tokenizer(tokenizer_file)
    held_out = []
    for path in paths:
        held_out.append((path, *open_path(path, tokenizer, config)))
    eval_function = compiler.jit(eval_step)
    for path, batches, num_bytes in held_out:
        with jax.set_mesh(mesh):
            nats, tokens = total_loss(eval_function, model, batches, mesh)
        yield TextLoss(path, tokens, num_bytes, nats / tokens, bits_per_byte(nats, num_bytes))
