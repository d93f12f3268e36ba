"""Rate of `grok data prepare` compared with SentencePiece alone, on the same cores.

    python benchmarks/prepare_rate.py FOLDER --tokenizer FILE --workers 2 --glob '*.py'

Both tokenize the same files with the same number of processes: `prepare` also reads, hashes,
checks and writes, while the other only runs SentencePiece's encode over texts in memory. They
alternate, so that other work on the machine slows both. Prints a line for each turn, and the ratio
of the summed rates, by wall time and by CPU time of all processes.
"""

import argparse
import multiprocessing
import resource
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import sentencepiece

from grok.data.prepare.job import PrepareOptions, prepare_dataset
from grok.data.prepare.sources import find_files

_processor: sentencepiece.SentencePieceProcessor | None = None


def start(model: bytes) -> None:
    """Load a process's model."""
    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_proto=model)


def encode(texts: list[str]) -> int:
    """Tokens of texts, each encoded and dropped."""
    assert _processor is not None
    return sum(len(_processor.encode(text)) for text in texts)


def raw(texts: list[str], model: bytes, workers: int) -> int:
    """Tokens of all texts, encoded by so many processes."""
    groups: list[list[str]] = [[]]
    size = 0
    for text in texts:
        groups[-1].append(text)
        size += len(text)
        if size > 1 << 18:
            groups.append([])
            size = 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start, (model,)) as pool:
        return sum(pool.map(encode, groups))


def cpu_seconds() -> float:
    """CPU time of this process and those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Rate of prepare beside SentencePiece alone.")
    parser.add_argument("folder")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--glob", default="*.py")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    files = find_files([arguments.folder], [arguments.glob])
    texts = [Path(file.name).read_text(errors="replace") for file in files]
    size = sum(len(text.encode()) for text in texts)
    model = Path(arguments.tokenizer).read_bytes()
    options = PrepareOptions(
        sources=(arguments.folder,),
        tokenizer=arguments.tokenizer,
        patterns=(arguments.glob,),
        workers=arguments.workers,
        max_bad_share=0.5,
    )
    print(f"{len(files):,} files, {size / 1e6:.1f} MB, {arguments.workers} processes")
    totals: dict[str, list[float]] = {"prepare": [0.0, 0.0], "raw": [0.0, 0.0]}
    for turn in range(arguments.turns):
        out = Path(tempfile.mkdtemp())
        for name in ("prepare", "raw"):
            clock, cpu = time.monotonic(), cpu_seconds()
            if name == "prepare":
                prepare_dataset(options, out / "data")
            else:
                raw(texts, model, arguments.workers)
            spent = time.monotonic() - clock, cpu_seconds() - cpu
            totals[name] = [total + s for total, s in zip(totals[name], spent, strict=True)]
            print(f"turn {turn} {name:8} {size / 1e6 / spent[0]:6.2f} MB/s, {spent[1]:6.1f} CPU s")
        shutil.rmtree(out)
    by_clock, by_cpu = (totals["raw"][i] / totals["prepare"][i] for i in (0, 1))
    print(f"prepare / raw: {by_clock:.3f} by the clock, {by_cpu:.3f} by CPU time")


if __name__ == "__main__":
    main()
