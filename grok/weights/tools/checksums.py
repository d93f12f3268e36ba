"""Compares weights with checksums: those that were made when a checkpoint was written, and those
that somebody published for files."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from grok import storage
from grok.checkpoint.file_list import check_files
from grok.errors import CheckpointError, DamageError
from grok.weights.checksums import piece_checksum
from grok.weights.orbax.array_tree import ArrayTree
from grok.weights.orbax.metadata import LORA, MODEL
from grok.weights.orbax.source import NO_WEIGHTS, LoraSource, OrbaxSource
from grok.weights.source import (
    ByteCounter,
    OnProgress,
    Part,
    Source,
    TensorSpec,
    layer_pieces,
    no_progress,
)

READERS = 8  # threads
BLOCK_BYTES = 1 << 24
HEX_DIGITS = 64


@dataclasses.dataclass(frozen=True)
class ChecksumResult:
    """A tensor or file against its checksums: their number, and a word or two for each of those
    that differ, such as "layer 1"."""

    name: str
    checksums: int
    differing: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Returns True where every checksum is the stored one."""
        return not self.differing


def verify_checkpoint(
    source: Source, on_progress: OnProgress = no_progress
) -> Iterator[ChecksumResult]:
    """Reads all of our own checkpoint, also what is not of the model, and yields the comparison of
    each array with the checksums of its save; of an import, of each tensor with those of its
    layers. Raises CheckpointError for other formats, and for damage of other files than arrays'."""
    if not isinstance(source, OrbaxSource | LoraSource):
        raise CheckpointError(
            f"{source.path}: keeps no checksums, as checkpoints of grok do; name a second one to "
            "compare it with, or with --checksums a file as sha256sum writes it."
        )
    check_files(source.step)
    present = storage.list_files(source.step, CheckpointError)
    items = [name for name in (MODEL, LORA, *NO_WEIGHTS) if name in present]
    trees = {item: ArrayTree(storage.join(source.step, item)) for item in items}
    counter = ByteCounter(on_progress, sum(tree.nbytes for tree in trees.values()))
    with ThreadPoolExecutor(READERS) as pool:
        for item, tree in trees.items():
            if isinstance(source, OrbaxSource) and source.checksums and item == MODEL:
                for spec in source.tensors.values():
                    yield _verify_layers(pool, source, spec, counter)
                continue
            for name in tree.shapes:
                yield _verify_chunks(pool, f"{item}/{name}", tree, name, counter)


def _verify_layers(
    pool: ThreadPoolExecutor, source: OrbaxSource, spec: TensorSpec, counter: ByteCounter
) -> ChecksumResult:
    pieces = list(layer_pieces(spec))

    def differs(piece: tuple[int | None, Part]) -> bool:
        layer, part = piece
        try:
            checksum = piece_checksum(source, spec, part)
        except DamageError:
            checksum = ""
        counter.add(spec.name, spec.nbytes // len(pieces))
        return checksum != source.checksums.get((spec.name, layer))

    marks = zip(pieces, pool.map(differs, pieces), strict=True)
    layers = [layer for (layer, _), is_other in marks if is_other]
    words = tuple("all" if layer is None else f"layer {layer}" for layer in layers)
    return ChecksumResult(spec.name, len(pieces), words)


def _verify_chunks(
    pool: ThreadPoolExecutor, title: str, tree: ArrayTree, name: str, counter: ByteCounter
) -> ChecksumResult:
    chunks = list(tree.chunks(name))

    def differs(part: Part) -> bool:
        try:
            counter.add(title, tree.read(name, part).nbytes)
        except DamageError:
            return True
        return False

    marks = zip(chunks, pool.map(differs, chunks), strict=True)
    corners = [[s.start for s in part] for part, is_other in marks if is_other]
    return ChecksumResult(title, len(chunks), tuple(f"at {corner}" for corner in corners))


def read_published(path: storage.StrPath) -> dict[str, str]:
    """The checksums by file name in a file that sha256sum wrote. Raises CheckpointError for other
    lines, and for names that are not below a folder, or there twice."""
    checksums: dict[str, str] = {}
    text = storage.read_bytes(path, CheckpointError).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        checksum, mark, name = (
            line[:HEX_DIGITS].lower(),
            line[HEX_DIGITS:][:2],
            line[HEX_DIGITS:][2:],
        )
        name = name.removeprefix("./")
        is_hex = len(checksum) == HEX_DIGITS and not checksum.strip("0123456789abcdef")
        if not (is_hex and mark in ("  ", " *") and name):
            raise CheckpointError(
                f"{path}:{number}: is no line of sha256sum, 64 hexadecimal digits, two blanks and "
                "the name of a file."
            )
        if name.startswith("/") or ".." in name.split("/") or name in checksums:
            raise CheckpointError(
                f"{path}:{number}: {name} is there twice or outside the folder; `sha256sum *` in "
                "the folder of the weights writes right names."
            )
        checksums[name] = checksum
    if not checksums:
        raise CheckpointError(f"{path}: has no checksums; `sha256sum *` writes such a file.")
    return checksums


def verify_published(
    folder: storage.StrPath, published: Mapping[str, str], on_progress: OnProgress = no_progress
) -> Iterator[ChecksumResult]:
    """Yields the comparison of each file in `folder` with its `published` SHA-256. Raises
    CheckpointError where a file is missing or cannot be read."""
    present = storage.list_files(folder, CheckpointError)
    sizes: dict[str, int] = {}
    for name in published:
        path = storage.join(folder, name)
        size = present.get(name)
        if size is None and not storage.exists(path, CheckpointError):
            raise CheckpointError(f"{path}: is missing, and has a published checksum.")
        sizes[name] = size or 0
    counter = ByteCounter(on_progress, sum(sizes.values()))

    def checksum(name: str) -> str:
        return _sha256(storage.join(folder, name), lambda nbytes: counter.add(name, nbytes))

    with ThreadPoolExecutor(READERS) as pool:
        for name, value in zip(published, pool.map(checksum, published), strict=True):
            differing = ("all",) if value != published[name] else ()
            yield ChecksumResult(name, 1, differing)


def _sha256(path: str, on_read: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with storage.open_file(path, CheckpointError, BLOCK_BYTES) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_read(len(block))
    return digest.hexdigest()
