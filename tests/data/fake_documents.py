"""Prepared datasets, in memory and as small folders, for tests of what is made of them."""

import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from grok.data.dataset import Document, encode_document
from grok.data.manifest import FORMAT
from grok.data.prepare.shards import WRITER_OPTIONS


class FakeDocuments:
    """Documents of given lengths; token ids are `first_token`, `first_token + 1`, ... throughout,
    so that a token names its place in its dataset."""

    def __init__(self, lengths, first_token: int = 1, masks=None):
        self.lengths = np.array(lengths, np.uint32)
        self.hash = f"fake-{first_token}-{list(lengths)}"
        self.reads = 0
        self._ends = first_token + np.cumsum(self.lengths.astype(np.int64))
        self._masks = masks

    def tokens(self, index: int) -> np.ndarray:
        end = self._ends[index]
        return np.arange(end - self.lengths[index], end, dtype=np.int32)

    def prefetch(self, indices) -> None:
        """They are in memory."""

    def __getitem__(self, index: int) -> Document:
        self.reads += 1
        mask_S = None if self._masks is None else np.array(self._masks[index], np.uint8)
        return Document(self.tokens(index), mask_S, {})


def random_lengths(count: int, largest: int, seed: int = 0) -> list[int]:
    """Mostly short documents and a few long ones."""
    draw = np.random.default_rng(seed)
    return np.minimum(draw.lognormal(3, 1, count).astype(int) + 1, largest).tolist()


def write_prepared(folder: Path, documents, **manifest) -> str:
    """A folder that `Prepared` opens, with one shard; gives its path."""
    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / "shard.arrayrecord"), WRITER_OPTIONS)
    for tokens in documents:
        writer.write(encode_document(np.asarray(tokens), None, {}))
    writer.close()
    lengths_N = np.array([len(tokens) for tokens in documents], np.uint32)
    np.save(folder / "lengths.npy", lengths_N)
    counts = {"documents": len(documents), "tokens": int(lengths_N.sum())}
    counts["loss_tokens"] = counts["tokens"]
    size = (folder / "shard.arrayrecord").stat().st_size
    shards = [{"name": "shard.arrayrecord", "sha256": "0" * 64, "bytes": size, **counts}]
    tokenizer = {"sha256": "0" * 64, "vocab_size": 256}
    others = {"counts": counts, "shards": shards, "files": {}, "sources": []}
    content = {"format": FORMAT, **others, "tokenizer": tokenizer, **manifest}
    (folder / "manifest.json").write_text(json.dumps(content))
    return str(folder)
