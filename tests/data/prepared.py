"""Text and a tokenizer for tests of prepared datasets."""

import hashlib
import inspect
import json
from pathlib import Path

from grok.data.prepare.job import PrepareOptions, prepare_dataset
from grok.data.tokenizers import load_tokenizer
from grok.data.tokenizers.sentencepiece import train_tokenizer

TEXTS = [f"Row {i}: " + " ".join(str(i * k) for k in range(1 + 7 * i % 40)) for i in range(120)]


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make_tokenizer(folder: Path) -> str:
    (folder / "sample.txt").write_text(inspect.getsource(inspect))
    train_tokenizer([folder / "sample.txt"], folder / "t.model", 384, special=["<|separator|>"])
    return str(folder / "t.model")


def options(sources: list[str], tokenizer: str, **others) -> PrepareOptions:
    return PrepareOptions(
        sources=tuple(sources), tokenizer=tokenizer, **{"shard_bytes": 5000, **others}
    )


def prepare(out: Path, sources: list[str], tokenizer: str, **others) -> dict:
    return prepare_dataset(options(sources, tokenizer, **others), out)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rejected(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def texts_of(data, tokenizer: str) -> list[str]:
    pieces = load_tokenizer(tokenizer)
    return [pieces.decode(data[i].tokens_S[:-1].tolist()) for i in range(len(data))]
